"""What system tests stand on: real upstreams, a real gup, real clients. Never imports gup."""
