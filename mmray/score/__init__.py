"""Scores a table of any size: plan -> slices scored by a pool of actors -> one create-once file each -> `_SUCCESS`."""
