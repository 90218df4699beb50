"""The API of the control plane: what an endpoint is, the models of responses, the endpoints by subject."""
