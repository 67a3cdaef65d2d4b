"""Pure functions of matrices that adapters and mitigations share."""
