"""Cameras by name: those of new data are numbered as training numbered them, whatever list or folder they come from."""

from collections.abc import Sequence
from dataclasses import replace

from fusionreid.dataloading.datasets.names import camera_key
from fusionreid.dataloading.records import PARTS, Split


def number_as_trained(split: Split, cameras: Sequence[int], names: Sequence[str]) -> Split:
    """Number the cameras of a split as training did with `names`; one that it never saw gets a number of its own.

    Where no name is known to training, as in a checkpoint without names, the numbers stay.
    """
    known = {camera_key(name): number for number, name in zip(cameras, names)}
    found = {number: known.get(camera_key(name)) for number, name in split.camera_names.items()}
    unnamed = [*names] == [str(camera + 1) for camera in cameras]
    if not split.camera_names or (unnamed and all(number is None for number in found.values())):
        return split
    free = max([*cameras, *split.camera_names]) + 1
    number_of = {
        number: free + place if trained is None else trained for place, (number, trained) in enumerate(found.items())
    }
    train, query, gallery = (
        tuple(replace(record, camera=number_of[record.camera]) for record in getattr(split, part)) for part in PARTS
    )
    of_split = {number_of[number]: name for number, name in split.camera_names.items()}
    named = {**dict(zip(cameras, names)), **of_split}
    return replace(split, train=train, query=query, gallery=gallery, camera_names=named)
