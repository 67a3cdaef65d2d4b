"""A content-addressed store of stages."""
