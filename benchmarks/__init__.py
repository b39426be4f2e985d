"""``python -m benchmarks``: is it right, is it faster than what one would use instead, and how near the limit is it?"""
