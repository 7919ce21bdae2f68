"""The worst case over several searches: how they are run, what their outcomes must fit, and the record of the kind."""
