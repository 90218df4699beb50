"""Tokens that are read again while somebody writes their file."""

import socket

from gup.config import Listen
from gup.control import auth
from gup.control.auth import Access
from gup.control.tokens import Presented, Right


async def test_a_file_that_changes_while_it_is_read_leaves_the_old_token_in_force(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("a-token-of-this-test\n")
    listen = Listen(admin_token_file=file)
    (tmp_path / "run").mkdir()
    held = Access()
    with socket.create_server(("127.0.0.1", 0)) as admin:
        await held.open(listen, tmp_path / "run", admin)
        checked = auth._checked

        def emptied(listen):
            context = checked(listen)
            file.write_text("\n")
            return context

        monkeypatch.setattr(auth, "_checked", emptied)
        await held.renew(listen, tmp_path / "run")
    assert held.tokens.right(Presented("a-token-of-this-test"), near=False) is Right.CHANGE
