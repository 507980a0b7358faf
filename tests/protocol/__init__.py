"""The commit protocol under every schedule: the real code of drivers and workers over a bucket that a search controls.

`code` runs the package's own functions from one request to the next, `world` says what may come of a request,
`search` goes through all schedules or random ones, `invariants` says what must hold, `mutants` takes rules away.
"""
