"""The packaged stream by a plain PyTorch loop: padded batches, head at supervised positions, AdamW, clipping at 1.0.

No framework: PEFT's own LoRA layers and transformers' default attention. An arm of `lockstep.py`.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence

import packaged_rows
import torch
import torch.nn.functional as F
from packaged_rows import Encoded
from torch import Tensor
from transformers import AutoTokenizer


def pad(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels (-100 where nothing is supervised), padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    padded, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (ids, start) in enumerate(rows):
        padded[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
        labels[i, start : len(ids)] = torch.tensor(ids[start:])
    return padded, mask, labels


def main() -> None:
    """Train the stream, print the last row of the matrix and the peak memory."""
    options = packaged_rows.parser(__doc__).parse_args()
    _, _, train, test = packaged_rows.stream(options, AutoTokenizer.from_pretrained(options.model))
    _, model = packaged_rows.load(options)
    core = model.get_base_model()

    def nll(rows: Sequence[Encoded]) -> Tensor:
        ids, mask, labels = pad(rows)
        hidden = core.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        at = targets != -100
        return F.cross_entropy(core.lm_head(hidden[at]), targets[at], reduction="none")

    leaves = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for steps in train.values():
        optimizer = torch.optim.AdamW(leaves, lr=options.lr, weight_decay=0.01)
        for rows in steps:
            optimizer.zero_grad()
            nll(rows).mean().backward()
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()
    model.eval()
    scored = {} if options.no_eval else test
    with torch.inference_mode():
        last = [float(torch.cat([nll([row]) for row in rows]).mean()) for rows in scored.values()]
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps({"tag": "loop", "R": [last] if last else [], "rss_mib": peak}), flush=True)


if __name__ == "__main__":
    main()
