"""Search on a quadratic model of the output distance: measure it, anneal on it, check it."""
