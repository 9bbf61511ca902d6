"""Numbers and structures of the NBD protocol, all big-endian.

Source: doc/proto.md of https://github.com/NetworkBlockDevice/nbd, sections "Values", "Fixed
newstyle negotiation", "Option haggling" and "Transmission phase".
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

INIT_MAGIC = 0x4E42444D41474943  # NBDMAGIC
OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

GREETING = struct.Struct(">QQH")  # magics, handshake flags
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
EXPORT_ANSWER = struct.Struct(">QH")  # size, transmission flags; padded for old clients
EXPORT_PADDING = bytes(124)
INFO_EXPORT = struct.Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE = struct.Struct(">HIII")  # type, least, preferred, most
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
DATA_CHUNK = struct.Struct(">IHHQIQ")  # the same, and the offset of the data
HOLE = struct.Struct(">QI")  # offset, length
CHUNK_ERROR = struct.Struct(">IH")  # error, length of the message
CHUNK_OFFSET = struct.Struct(">Q")
EXTENT = struct.Struct(">II")  # length, status

MAX_OPTION_LENGTH = 64 << 10
"""Longer ones are read and refused. Names have at most 4096 bytes, by the protocol."""
MAX_NAME = 4096
MAX_MESSAGE = 4096
MAX_REQUEST = 32 << 20
"""What the protocol says that a server should serve at once."""
MAX_EXTENTS = 4096
"""In one answer to a block status request; the client goes on from there."""

BASE_ALLOCATION = b"base:allocation"


class Handshake(IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Answer(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = (1 << 31) + 1
    POLICY = (1 << 31) + 2
    INVALID = (1 << 31) + 3
    TLS_REQUIRED = (1 << 31) + 5
    UNKNOWN = (1 << 31) + 6
    TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_CACHE = 1024


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_DONE = 1


class Status(IntFlag):
    HOLE = 1
    ZERO = 2


class Error(IntEnum):
    EPERM = 1
    EIO = 5
    EINVAL = 22
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108
