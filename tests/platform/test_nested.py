"""The nested view beside a run of the same job: every frequency counted, every parameter and byte of state found."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nestling.config.build import build as job
from nestling.models import MODEL_CONFIGS, build
from nestling.models.continuum import with_moving_levels
from nestling.optim import COMPONENTS, Levels, watch_inputs
from nestling.optim.components import rule_name
from nestling.optim.nested import enclosing
from nestling.training.groups import parameter_groups
from nestling.training.nested import nested_view

STEPS, LENGTH, ROWS = 12, 16, 2


def config(**changes):
    model = {"name": "hope", "vocab_size": 31, "width": 16, "layers": 2, "heads": 2, **changes.pop("model", {})}
    if model["name"] == "hope":
        model = {"chunk_size": 8, "projection_chunk_size": 4, **model}
    training = {"batch_tokens": ROWS * LENGTH, "learning_rate": 1e-4, **changes.pop("training", {})}
    return job({"data": {"sequence_length": LENGTH}, "model": model, "training": training, **changes})


def trained(settings):
    """A model and its optimizer after STEPS steps, and how often each parameter and state tensor has changed."""
    torch.manual_seed(0)
    model = build(settings.model)
    if settings.training.optimizer == "delta_gradient_descent":
        watch_inputs(model)
    optimizer = Levels(parameter_groups(model, settings), lr=0.01)
    changes, before = Counter(), {}
    for _ in range(STEPS):
        text = torch.randint(0, 31, (ROWS, LENGTH + 1))
        optimizer.zero_grad()
        F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            tensors = {"": parameter, **{k: v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}}
            for kind, tensor in tensors.items():
                old = before.get((name, kind), torch.zeros_like(tensor) if kind not in ("", "start") else None)
                if kind == "accumulator":  # emptied by the move that it is for
                    changes[name, kind] += 1
                elif old is not None:
                    changes[name, kind] += not torch.equal(old, tensor)
                before[name, kind] = tensor.detach().clone()
    return model, optimizer, changes


def shown(group):
    """What the view calls a level of the optimizer."""
    return "rest" if group["name"] == "base" else f"CMS {group['name']}"


def by(optimizer, group, parameter, kind=""):
    """What names say of a rule that is not its level's own; a nested level's start moves by the slower level's."""
    if kind.startswith("start") and kind != "start_gradient":
        group = enclosing(group, optimizer.param_groups)
    rule = rule_name(group, parameter, optimizer.whole)
    return "" if rule == group["optimizer"] else f" ({rule})"


LADDER = [
    {"width": 8, "period": 1},
    {"width": 8, "period": 3},
    {"width": 8, "period": 4 * ROWS * LENGTH, "unit": "tokens"},
]


#: Periods that nested levels can have.
NESTED = [{"width": 8, "period": period, "optimizer": rule} for period, rule in ((1, "adamw"), (2, "muon"), (4, "sgd"))]


@pytest.mark.parametrize(
    ("name", "optimizer", "changed"),
    [("hope", name, {}) for name in COMPONENTS]
    + [(name, "adamw", {}) for name in MODEL_CONFIGS if name != "hope"]
    + [("hope", "adamw", {"level_variant": "nested"}), ("hope", "adamw", {"memory": "matrix", "static": []})],
)
def test_frequencies_parameters_and_state_are_those_of_a_run(name, optimizer, changed):
    settings = config(
        model={"name": name, **changed},
        training={"optimizer": optimizer},
        levels=NESTED if "level_variant" in changed else LADDER,
        optimizers={"m3": {"slow_period": 3, "mode": "adamuon"}},
    )
    rows = {row.component.name: row for row in nested_view(settings)}
    model, optimizer, changes = trained(settings)
    found, bytes_kept = Counter(), Counter()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            full = next(n for n, p in model.named_parameters() if p is parameter)
            part = rows[f"{shown(group)}: {model.role(full)}{by(optimizer, group, parameter)}"]
            # The first step is what the second is compared with.
            assert changes[full, ""] in {int(part.updates_per_step * STEPS) - d for d in (0, 1)}, (full, part)
            found[part.component.name] += parameter.numel()
            for kind, tensor in optimizer.state[parameter].items():
                if torch.is_tensor(tensor):
                    kept = rows[f"{shown(group)}: {kind}{by(optimizer, group, parameter, kind)}"]
                    counted, expected = changes[full, kind], kept.updates_per_step * STEPS
                    # What takes in a block when the next begins has one change less.
                    assert expected - 1 - 1e-9 <= counted <= expected + 1e-9, (full, kind, counted, expected)
                    bytes_kept[kept.component.name] += tensor.numel() * tensor.element_size()
    assert found == {n: row.component.parameters for n, row in rows.items() if row.component.parameters}
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())
    for kept_name, count in bytes_kept.items():
        assert rows[kept_name].component.state_bytes == count
    starts = {n for n in bytes_kept if ": start" in n and rows[n].component.context == "tokens"}
    of_gradients = {n for n, row in rows.items() if row.component.context == "gradients" and row.per == "batch"}
    assert of_gradients == set(bytes_kept) - starts


def test_levels_are_ordered_and_what_moves_weights_comes_before_them():
    rows = nested_view(config(levels=LADDER))
    rates = [row.component.updates_per_token for row in rows]
    assert rates == sorted(rates, reverse=True) and [row.level for row in rows] == sorted(row.level for row in rows)
    level = {row.component.name: row.level for row in rows}
    assert level["main memory"] == 1 < level["key memory"] < level["rest: exp_avg"] < level["rest: projections"]
    assert level["rest: projections"] == level["CMS level1: feed-forward"] < level["CMS level2: feed-forward"]
    assert level["CMS level2: accumulator"] == level["rest: exp_avg"] < level["CMS level2: exp_avg"]


def test_levels_of_the_optimizer_are_not_mistaken_for_nested_ones():
    rows = nested_view(config(model={"name": "transformer"}, levels=[{"parameters": ["head*"], "period": 2}]))
    names = {row.component.name.partition(":")[0] for row in rows if row.per == "batch"}
    assert names == {"rest", "group level1"}


@pytest.mark.parametrize(
    "changed",
    [{}, {"read": "boundary"}, {"chunk_size": 5}, {"chunk_size": 64, "projection_chunk_size": 64}, {"momentum": 0.5}],
)
def test_memories_change_as_often_as_they_say(changed):
    settings = config(model={"eta_bias": -1.0, "write": "all", **changed})
    read = settings.model.read
    rows = {row.component.name: row for row in nested_view(settings)}
    torch.manual_seed(0)
    model = build(settings.model)
    state, changes = model.initial_state(1), Counter()
    for token in torch.randint(0, 31, (1, LENGTH)).split(1, dim=1):
        before = state[0].memory
        state = model(token, state)[1]
        after = state[0].memory
        for name in ("key", "value", "eta", "alpha"):
            changes[f"{name} memory"] += not torch.equal(before.snapshots[name][0], after.snapshots[name][0])
        seen = [m.snapshots if read == "boundary" else m.weights for m in (before, after)]
        changes["main memory"] += not torch.equal(seen[0]["memory"][0], seen[1]["memory"][0])
    for name, count in changes.items():
        assert count == rows[name].updates_per_step == rows[name].component.updates_per_token * LENGTH
        assert rows[name].per == "sequence"
    sums = {n: row for n, row in rows.items() if n.endswith("memory: momentum")}
    assert len(sums) == (5 if settings.model.momentum else 0)
    for name, row in sums.items():
        held = state[0].memory.momentum[name.split()[0].replace("main", "memory")]
        assert row.component.state_bytes == 2 * sum(s.numel() * 4 for s in held)  # two blocks
    memory = state[0].memory
    held = sum(w.numel() * 4 for part in (memory.weights, memory.snapshots) for w in part["key"])
    assert rows["key memory"].component.state_bytes == 2 * held  # two blocks


@pytest.mark.parametrize(
    ("variant", "periods", "rates"),
    [("sequential", [2, 3], [0.3, 0.1]), ("nested", [2, 4], [0.3, 0.1]), ("nested", [2, 4], [0.0, 0.1])],
)
def test_levels_that_move_in_context_change_as_often_as_they_say(variant, periods, rates):
    settings = config(
        model={"name": "hope_attention", "level_variant": variant},
        levels=[{"width": 8, "period": 1}, {"width": 6, "period": 2}],
        continuum={"drive": "stream", "periods": periods, "rates": rates},
    )
    rows = {row.component.name: row for row in nested_view(settings)}
    torch.manual_seed(0)
    reader = with_moving_levels(build(settings.model), settings.continuum)
    state, changes, held = reader.initial_state(1), Counter(), Counter()
    for token in torch.randint(0, 31, (1, LENGTH)).split(1, dim=1):
        before, state = state, reader(token, state)[1]
        for number, (old, new) in enumerate(zip(before.levels, state.levels, strict=True), start=1):
            kinds = {
                "": "weights",
                ": accumulator": "errors",
                ": start": "start",
                ": start: accumulator": "start_errors",
            }
            for kind, field in kinds.items():
                was, now = getattr(old, field), getattr(new, field)
                name = f"CMS level{number} in context{kind}"
                # Errors are taken in whenever a block has ended, by what is emptied then as well.
                ended = len(before.tokens[0]) >= len(state.tokens[0])
                changes[name] += ended if "accumulator" in kind else was is not now
                if now:
                    held[name] = sum(weight.nbytes for weight in now.values())
    assert {name for name in rows if " in context" in name} == set(held)
    for name, count in held.items():
        assert rows[name].per == "sequence" and rows[name].component.state_bytes == count
        assert changes[name] == pytest.approx(rows[name].updates_per_step), name
    assert "CMS level1: initial feed-forward" in rows and "CMS level1: feed-forward" not in rows


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", sorted(set(MODEL_CONFIGS) - {"hope", "lstm"}))
def test_the_operations_of_weights_are_those_counted(name, tie):
    settings = config(model={"name": name, "tie_head": tie}, levels=LADDER[:1])
    rows = nested_view(settings)
    weights = [row.component for row in rows if row.component.parameters]
    model = build(settings.model)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, LENGTH, dtype=torch.int64))
    products = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in products.items() if str(op) in ("aten.mm", "aten.addmm"))
    tables = sum(
        2 * p.numel()
        for n, p in model.named_parameters()
        if p.dim() == 2 and ("embedding" not in n or tie) and "conv" not in n
    )
    assert linear == tables * LENGTH
    moving = sum(14 * part.parameters / settings.training.batch_tokens for part in weights)
    small = sum(
        p.numel() * (2 if p.dim() >= 2 else 1) for n, p in model.named_parameters() if p.dim() < 2 or "conv" in n
    )
    assert sum(part.flops_per_token for part in weights) == pytest.approx(tables + small + moving)
