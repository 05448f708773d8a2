"""The HTTP interface over an engine: routes, clients' shapes, keys. Knows neither Ray nor models.

Read `application.py` first; `exchange.py` is what a route is given, and each other module holds the routes of one kind.
"""
