"""The dashboard: one static page that speaks to the REST API, and the files it is made of."""
