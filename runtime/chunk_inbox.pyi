from chatvla_edge.runtime.mailbox import ChunkMailbox

class ChunkInbox:
    def __init__(self, mailbox: ChunkMailbox, sync: bool) -> None: ...
