"""The drift detector on the real stream: changes of domain are found at once, and where nothing changes nothing is."""

import math

import pytest
import torch
import torch.nn.functional as F

from nestling.data import IGNORED, Tokenizer
from nestling.data.streams import Interval, Rules
from nestling.data.streams.content import batches, read_window
from nestling.data.streams.five_domains import NAME, ORDER, SHUFFLED, FiveDomains
from nestling.data.streams.windows import Plan
from nestling.evaluation.drift import PageHinkley
from nestling.models import build


def alarms(name):
    """Steps at which a small model's loss before learning raises the alarm, and those at which domains begin."""
    source = FiveDomains(name)
    (end,) = source.ends({}).values()
    content = read_window(source, Plan(0, (Interval("0", 0, end),)), Rules(), {})
    torch.manual_seed(0)
    model = build({"name": "transformer", "vocab_size": 257, "width": 32, "layers": 1, "heads": 2})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    detector, found, begins = PageHinkley(), [], {}
    for step, batch in enumerate(batches(content.trained, Tokenizer.bytes(), 128, 16), 1):
        for domain in batch.names:
            begins.setdefault(domain, step)
        inputs, targets = (torch.from_numpy(half).long() for half in (batch.inputs, batch.targets))
        nats = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        if detector.add(nats.item() / math.log(2) / sum(batch.bytes), float((batch.targets != IGNORED).mean())):
            found.append(step)
        optimizer.zero_grad()
        (nats / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return found, begins


@pytest.mark.slow
def test_changes_of_domain_are_found_and_nothing_else():
    torch.set_num_threads(1)
    found, begins = alarms(NAME)
    assert list(begins) == list(ORDER)
    changes = [begins[domain] for domain in ORDER[1:]]
    caught = [change for change in changes if any(0 <= step - change <= 5 for step in found)]
    assert len(caught) >= 3
    assert all(any(0 <= step - change <= 5 for change in changes) for step in found)
    assert alarms(SHUFFLED)[0] == []
