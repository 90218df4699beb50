"""The data plane's HTTP/1.1: listener, connections, requests, responses."""
