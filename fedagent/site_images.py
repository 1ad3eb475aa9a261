"""The site's images in memory: read once for a plan, kept between commands."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedagent.config import DataConfig
from fedagent.image_distance import Tick
from fedagent.impression_check import SitePictures
from fedagent.resident import ResidentImages
from fedcore.data import DatasetReader, SiteData, open_dataset
from fedcore.device import ComputeDevice
from fedcore.plan import Plan


def open_site_dataset(data: Mapping[str, Any]) -> DatasetReader:
    """The reader for agent.toml's section `data`. Raises ConfigError."""
    config = DataConfig.model_validate(data)
    return open_dataset(
        config.kind,
        config.path,
        class_names=config.class_names,
        allow_download=config.allow_download,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        options=config.options,
    )


@dataclass(slots=True)
class _Loaded:
    key: str
    data: SiteData
    train: ResidentImages
    # Made when they are first asked for.
    pictures: SitePictures | None = None


class SiteImages:
    """One site's data, as the last plan needed it. Another plan's size or classes read it anew."""

    def __init__(self) -> None:
        self._loaded: _Loaded | None = None

    def get(
        self, data: Mapping[str, Any], plan: Plan, device: ComputeDevice
    ) -> tuple[SiteData, ResidentImages]:
        """All splits, and the training split on the device.

        Raises DataError (CorruptImagesError above the plan's budget), PlanError, ConfigError.
        """
        key = json.dumps(
            [
                dict(data),
                plan.model.input,
                plan.model.classes,
                plan.data.model_dump(),
                plan.transform.model_dump(),
                str(device.device),
            ],
            sort_keys=True,
        )
        if self._loaded is None or self._loaded.key != key:
            self._loaded = None  # Let go of the old images before the new ones are read.
            site = open_site_dataset(data).read(plan)
            self._loaded = _Loaded(key, site, ResidentImages.of(site.train, device))
        return self._loaded.data, self._loaded.train

    def pictures(
        self, data: Mapping[str, Any], plan: Plan, device: ComputeDevice, tick: Tick
    ) -> SitePictures:
        """What impressions are compared with, made once and kept with the images. Raises what `get` and `tick` raise."""
        site, train = self.get(data, plan, device)
        assert self._loaded is not None
        if self._loaded.pictures is None:
            self._loaded.pictures = SitePictures.of(train, (site.validation, site.test), tick)
        return self._loaded.pictures
