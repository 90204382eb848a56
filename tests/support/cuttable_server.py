"""`lmi-dist` whose connection to rank 0 can be cut from outside: SIGUSR1 sends half a request and then the end."""

import asyncio
import signal
import sys

from lmi_dist_handler import cli
from lmi_dist_handler.group import Group
from lmi_dist_handler.wire import Codec, Input, PairList

HALF_A_REQUEST = Codec().encode_request(Input({"handler": "handle"}, PairList([("data", b"x" * 1000)])))[:500]


def cut(group: Group) -> None:
    group._writers[0].write(HALF_A_REQUEST)
    group._writers[0].close()


async def start(group: Group) -> None:
    await real_start(group)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, cut, group)


real_start = Group.start
Group.start = start  # type: ignore[method-assign]
sys.exit(cli.main())
