"""The report's table of contents: which tables stand under which claim, and what must be run to fill them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from attnbench import afterwards, published, tables


@dataclass(frozen=True)
class Entry:
    """A table of the page: where it belongs, what it is called, how it is made, and what must run to fill it.

    `make` is given the frame of runs, or the folder of results where `outside` them. `note` is empty where nothing need
    be run: the table has no rows if nothing of the kind happened.
    """

    key: str
    claim: str
    title: str
    make: Callable[..., pd.DataFrame]
    note: str
    outside: bool = False


def blank(note: str) -> str:
    """What stands in place of a table without rows, by the note of its entry."""
    return f"Not run. It needs {note}." if note else "None."


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "ladder",
        "C1",
        "Side by side: cost and likelihood at each resolution",
        tables.ladder,
        "runs of one setting at several --data.side",
    ),
    Entry(
        "exponents",
        "C1",
        "How cost grows with the number of pixels",
        tables.exponents,
        "runs at several sides with memory and throughput measured",
    ),
    Entry(
        "costs",
        "C1",
        "How the cost of attention and of a training step grows, cell by cell",
        afterwards.costs,
        "python -m attnbench.cost",
        True,
    ),
    Entry("cnns", "C1", "CNNs beside the trunk", tables.cnns, "runs of the CNNs"),
    Entry("scans", "C2", "Likelihood by scan order", tables.scans, "runs at several --scan"),
    Entry(
        "above",
        "C2",
        "Regret where each pixel depends on the one above",
        tables.regrets("source:above"),
        "runs on source:above",
    ),
    Entry("places", "C2", "Where in the image the nats go", tables.places, "runs with an error map"),
    Entry("positions", "C3", "Position by mixer", tables.positions, "runs with --position"),
    Entry(
        "place",
        "C3",
        "Regret where a pixel depends on where it stands",
        tables.regrets("source:place"),
        "runs on source:place",
    ),
    Entry("windows", "C4", "Windows: likelihood and cost against reach", tables.windows, "runs of local variants"),
    Entry(
        "mesh",
        "C4",
        "Regret where the nearest neighbours are enough",
        tables.regrets("source:mesh"),
        "runs on source:mesh",
    ),
    Entry("decoding", "C5", "Decoding: speed and what must be kept", tables.decoding, "runs with throughput measured"),
    Entry(
        "mirror",
        "C5",
        "Regret where the lower half mirrors the upper",
        tables.regrets("source:mirror"),
        "runs on source:mirror",
    ),
    Entry(
        "recall", "C5", "Regret where pairs must be recalled", tables.regrets("source:recall"), "runs on source:recall"
    ),
    Entry(
        "correlations",
        "S1",
        "Loss against probe accuracy, within a setting",
        tables.correlations,
        "three runs of a setting and seed with probes",
    ),
    Entry("peaks", "S2", "Where along the depth the probe is best", tables.peaks, "runs with probes"),
    Entry("summary", "all", "Every setting in every context", tables.summary, "any finished run"),
    Entry(
        "tuning",
        "all",
        "Every learning rate that was tried",
        tables.tuning,
        "runs of one setting at several learning rates",
    ),
    Entry("failures", "all", "Runs that did not end well", tables.failures, ""),
    Entry(
        "replicas",
        "all",
        "Beside a published model of the same data, tokens and shape",
        published.replicas,
        "runs of the suites replica and replica-tenth",
    ),
    Entry("published", "all", "What others published, under other protocols", published.figures, ""),
    Entry("transfer", "C3", "Trained models at other sides", afterwards.transfer, "python -m attnbench.transfer", True),
    Entry("surgery", "C4", "Trained models under other masks", afterwards.surgery, "python -m attnbench.surgery", True),
    Entry(
        "attention",
        "C4",
        "Where attention goes by itself",
        afterwards.attention,
        "python -m attnbench.attention_map on runs with softmax attention",
        True,
    ),
)
