"""The control plane's requests, a module a resource with its `routes`. They ask the plane; no policy."""
