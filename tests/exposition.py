"""Reads what `/metrics` answers, with the parser of Prometheus' own library."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    # Tests of the ledger import this module in each of many processes, and a stage imports everything.
    from tests.stage import Stage

# A metric of ours in an expression, also with the suffixes of histograms.
NAME = re.compile(r"\b(?:llm_quota|process)_\w+")


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one answer says: the value of each series, by the metric's name and its labels."""

    series: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    types: Mapping[str, str]

    @classmethod
    def of(cls, text: str) -> "Metrics":
        """Parse an answer. A series that is stated twice fails."""
        series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        types = {}
        for family in text_string_to_metric_families(text):
            types[f"{family.name}_total" if family.type == "counter" else family.name] = family.type
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in series, key
                series[key] = sample.value
        return cls(series, types)

    @property
    def names(self) -> set[str]:
        """The names in the series, as an expression has them."""
        return {name for name, _ in self.series}

    def value(self, name: str, **labels: str) -> float:
        """The value of the one series with exactly these labels."""
        return self.series[name, frozenset(labels.items())]

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...] | str, float]:
        """`sum by (labels) (name)`, without the sums that are 0. With one label, the keys are its values."""
        sums: dict[tuple[str, ...] | str, float] = {}
        for (found, pairs), value in self.series.items():
            if found == name and value:
                values = tuple(dict(pairs)[label] for label in labels)
                key: Any = values if len(labels) > 1 else values[0]
                sums[key] = sums.get(key, 0.0) + value
        return sums


async def scrape(on: "Stage") -> Metrics:
    """What the admin listener of a stage answers."""
    async with on.http.get(f"{on.admin_url}/metrics") as response:
        assert response.status == 200
        return Metrics.of(await response.text())
