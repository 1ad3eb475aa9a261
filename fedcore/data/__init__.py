"""A site's images: readers by name, and what they give. Imports neither torch, PIL nor medmnist by itself.

`open_dataset(kind, path, ...)` gives a DatasetReader; `summarise()` is cheap, `read(plan)` gives SiteData
whose images are uint8 [N, H, W, C] of the plan's size and whose labels are numbers in the plan's class order.
"""

from fedcore.data.dataset import DatasetReader, DatasetSettings, DatasetSummary, LabelledImages, SiteData
from fedcore.data.readers import dataset_names, open_dataset

__all__ = [
    "DatasetReader",
    "DatasetSettings",
    "DatasetSummary",
    "LabelledImages",
    "SiteData",
    "dataset_names",
    "open_dataset",
]
