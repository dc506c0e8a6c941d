"""``redis://host:port/number``: a Redis server, for several machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConfigError, MemoryFileError, StorageError, needing
from .base import (
    PART,
    Info,
    Limits,
    Line,
    Record,
    Store,
    Usage,
    conflict,
    damaged,
    exists,
    joined,
    name_of,
    not_found,
    register,
)

log = logging.getLogger(__name__)

SCHEMA = 2
_TENANTS = "ccm:tenants"

# Every operation on a tenant is one script, so that it happens as a whole. KEYS[1] is the tenant's prefix P:
#   P:ids (sorted by id)  P:due (by end)  P:nbytes (in all)
#   P:s:ID  hash: fields of Info, lines (how many), and of each version n:created, n:metadata, n:payload, n:digest;
#           n:recipe in place of n:payload where that is cut
#   P:p:ID  hash: parts of payloads by name
#   P:t:ID  list: version, place, text and digest of each line
_HEAD = """
local P, now = KEYS[1], ARGV[1]
local function path(kind, id) return P .. ':' .. kind .. ':' .. id end
local function remove(id)
    redis.call('DECRBY', P .. ':nbytes', redis.call('HGET', path('s', id), 'nbytes') or 0)
    redis.call('DEL', path('s', id), path('p', id), path('t', id))
    redis.call('ZREM', P .. ':ids', id)
    redis.call('ZREM', P .. ':due', id)
end
local function purge()
    local due = redis.call('ZRANGEBYSCORE', P .. ':due', '-inf', now)
    for _, id in ipairs(due) do remove(id) end
    return #due
end
local function alive(id)
    local due = redis.call('ZSCORE', P .. ':due', id)
    return due and tonumber(due) > tonumber(now)
end
local function each(recipe, act)
    for i = 1, #recipe, PART do act(string.sub(recipe, i, i + PART - 1)) end
end
local function info(id)
    return redis.call('HMGET', path('s', id), 'version', 'created', 'updated', 'expires', 'nbytes')
end
"""

_SCRIPTS = {
    # id, expected version (-1: create), expires, keep, marked and dropped versions (",8,16,"), most sessions, most
    # bytes, record (6), how many parts, names and parts, lines (4 each)
    "write": """
local id, expected, expires, keep = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local function listed(n, list) return string.find(list, ',' .. n .. ',', 1, true) end
local most_sessions, most_bytes = tonumber(ARGV[8]), tonumber(ARGV[9])
local s, p, t = path('s', id), path('p', id), path('t', id)
purge()
local there = redis.call('HGET', s, 'version')
if expected < 0 then
    if there then return {'exists', there} end
else
    if not there then return {'missing'} end
    if tonumber(there) ~= expected then return {'conflict', there} end
end
local version, more, there, old, new, gone = ARGV[10], 0, {}, {}, {}, {}
local lines = version ~= '' and 17 + 2 * tonumber(ARGV[16]) or 0
if version ~= '' then
    more = #ARGV[12] + #ARGV[13] + #ARGV[15]
    for i = lines, #ARGV, 4 do more = more + #ARGV[i + 2] end
    local used = {}
    local function use(name) used[name] = true end
    each(ARGV[15], use)
    for i = 17, lines - 1, 2 do
        if redis.call('HEXISTS', p, ARGV[i]) == 0 then
            table.insert(new, i)
            more = more + #ARGV[i + 1]
        end
    end
    for _, field in ipairs(redis.call('HKEYS', s)) do
        local n = string.match(field, '^(%d+):digest$')
        if n then table.insert(there, tonumber(n)) end
    end
    table.sort(there, function(a, b) return a > b end)
    local alive = 1
    for _, number in ipairs(there) do
        local n = string.format('%.0f', number)
        local dropped = listed(n, ARGV[7])
        if not dropped then alive = alive + 1 end
        if dropped or (alive > keep and not listed(n, ARGV[6])) then
            table.insert(old, n)
            for _, name in ipairs({'metadata', 'payload', 'recipe'}) do
                more = more - redis.call('HSTRLEN', s, n .. ':' .. name)
            end
        else
            each(redis.call('HGET', s, n .. ':recipe') or '', use)
        end
    end
    for _, name in ipairs(redis.call('HKEYS', p)) do
        if not used[name] then
            table.insert(gone, name)
            more = more - redis.call('HSTRLEN', p, name)
        end
    end
end
local sessions = redis.call('ZCARD', P .. ':ids') + (expected < 0 and 1 or 0)
local nbytes = tonumber(redis.call('GET', P .. ':nbytes') or 0) + more
if (most_sessions >= 0 and sessions > most_sessions) or (most_bytes >= 0 and nbytes > most_bytes) then
    return {'quota', sessions, nbytes}
end
if expected < 0 then
    redis.call('ZADD', P .. ':ids', 0, id)
    redis.call('HSET', s, 'version', 0, 'created', now, 'nbytes', 0, 'lines', 0)
end
redis.call('ZADD', P .. ':due', expires == '' and '+inf' or expires, id)
redis.call('HSET', s, 'updated', now, 'expires', expires)
if version ~= '' then
    redis.call('HSET', s, 'version', version, version .. ':created', ARGV[11], version .. ':metadata', ARGV[12],
        version .. ':payload', ARGV[13], version .. ':digest', ARGV[14], version .. ':recipe', ARGV[15])
    for _, i in ipairs(new) do redis.call('HSET', p, ARGV[i], ARGV[i + 1]) end
    for _, name in ipairs(gone) do redis.call('HDEL', p, name) end
    for i = lines, #ARGV do redis.call('RPUSH', t, ARGV[i]) end
    for _, n in ipairs(old) do
        redis.call('HDEL', s, n .. ':created', n .. ':metadata', n .. ':payload', n .. ':digest', n .. ':recipe')
    end
    redis.call('HINCRBY', s, 'nbytes', more)
    redis.call('HINCRBY', s, 'lines', (#ARGV - lines + 1) / 4)
    redis.call('INCRBY', P .. ':nbytes', more)
end
return {'done'}
""",
    "get": """
local id, version = ARGV[2], ARGV[3]
if not alive(id) then return false end
local newest, top = redis.call('HGET', path('s', id), 'version'), 0
for _, field in ipairs(redis.call('HKEYS', path('s', id))) do
    top = math.max(top, tonumber(string.match(field, '^(%d+):digest$') or 0))
end
if version == '' then version = newest end
local parts = {}
each(redis.call('HGET', path('s', id), version .. ':recipe') or '', function(name)
    table.insert(parts, redis.call('HGET', path('p', id), name))
end)
return {newest, top, version, redis.call('HMGET', path('s', id), version .. ':created', version .. ':metadata',
    version .. ':payload', version .. ':digest'), parts}
""",
    "label": """
return redis.call('HGET', path('s', ARGV[2]), ARGV[3] .. ':metadata')
""",
    "versions": """
if not alive(ARGV[2]) then return false end
local found = {}
for _, field in ipairs(redis.call('HKEYS', path('s', ARGV[2]))) do
    local n = string.match(field, '^(%d+):digest$')
    if n then table.insert(found, tonumber(n)) end
end
return found
""",
    "transcript": """
if not alive(ARGV[2]) then return false end
return {redis.call('HGET', path('s', ARGV[2]), 'lines'), redis.call('LRANGE', path('t', ARGV[2]), 0, -1)}
""",
    "info": """
if not alive(ARGV[2]) then return false end
return info(ARGV[2])
""",
    "sessions": """
local after, limit, found = ARGV[2], tonumber(ARGV[3]), {}
for _, id in ipairs(redis.call('ZRANGEBYLEX', P .. ':ids', after == '' and '-' or '(' .. after, '+')) do
    if #found >= limit then break end
    if alive(id) then table.insert(found, {id, unpack(info(id))}) end
end
return found
""",
    "usage": """
local sessions, nbytes = 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. ':due', '(' .. now, '+inf')) do
    sessions, nbytes = sessions + 1, nbytes + tonumber(redis.call('HGET', path('s', id), 'nbytes'))
end
return {sessions, nbytes}
""",
    "delete": """
if not alive(ARGV[2]) then return false end
remove(ARGV[2])
return 1
""",
    "purge": "return purge()",
}


@register("redis")
class RedisStore(Store):
    """Memories in a Redis server (keys ``ccm:*`` of one database number), all of them in its working memory.

    A commit is as durable as the server makes it. That no acknowledged commit is lost needs ``appendonly yes`` and
    ``appendfsync always``; and ``maxmemory-policy noeviction``, or the server throws memories away when it is full.
    A warning is logged if it is set otherwise. One server with or without replicas; not a cluster.
    """

    def __init__(
        self, client: Any, error: type[Exception], limits: Limits | None, clock: Callable[[], float]
    ):
        super().__init__(limits, clock)
        self.client, self.error = client, error
        head = _HEAD.replace("PART", str(PART))
        self._scripts = {name: client.register_script(head + body) for name, body in _SCRIPTS.items()}

    @classmethod
    def open(cls, url: str, limits: Limits | None, clock: Callable[[], float]) -> Store:
        with needing("a store in Redis needs redis", "serve"):
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        try:
            if not urlsplit(url).hostname:
                raise ValueError("no host")
            # a commit that was sent again after a lost answer would conflict with itself
            once = Retry(NoBackoff(), 0)
            client = redis.Redis.from_url(url, socket_timeout=30, socket_connect_timeout=10, retry=once)
        except ValueError:  # its message may hold the password
            raise ConfigError("store redis://…: expected redis://user:password@host:port/number") from None
        store = cls(client, redis.RedisError, limits, clock)
        try:
            store._check_server()
        except BaseException:
            store.close()
            raise
        return store

    def _check_server(self) -> None:
        with self._errors():
            self.client.set("ccm:schema", SCHEMA, nx=True)
            number = self.client.get("ccm:schema")
        if not number.isdigit():
            raise MemoryFileError("store redis: the key ccm:schema was damaged; restore a backup")
        if int(number) > SCHEMA:
            raise ConfigError(
                f"store redis has schema {int(number)}, this release knows up to {SCHEMA}: "
                "upgrade compressed-context-memory"
            )
        if int(number) < SCHEMA:  # what it holds is read as it is
            with self._errors():
                self.client.set("ccm:schema", SCHEMA)
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        try:
            found = {name: self.client.config_get(name).get(name) for name in wanted}
        except self.error:  # hosted servers often refuse this command
            log.warning("store redis: its settings cannot be read; durable commits need %s", wanted)
            return
        if found != wanted:
            log.warning("store redis: settings %s can lose memories; durable commits need %s", found, wanted)

    def close(self) -> None:
        self.client.close()

    def check_health(self) -> None:
        with self._errors():
            self.client.set("ccm:health", self.clock())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self.error as error:
            raise StorageError(
                f"store redis: {error}; see to the server, then read the newest version and try again"
            ) from error

    def _run(self, script: str, tenant: str, now: float, *args: Any) -> Any:
        with self._errors():
            return self._scripts[script](keys=[f"ccm:{name_of(tenant)}"], args=[repr(now), *args])

    def _read(self, script: str, tenant: str, session: str, now: float, *args: Any) -> Any:
        found = self._run(script, tenant, now, session, *args)
        if found is None:
            raise not_found(session)
        return found

    # ------------------------------------------------------------------ reading

    def _get(self, tenant: str, session: str, version: int | None, now: float) -> Record | None:
        wanted = "" if version is None else version
        newest, top, number, fields, parts = self._read("get", tenant, session, now, wanted)
        with _decoding(session):
            if int(newest) != top:
                raise damaged(session, f"version {top}")
            if not top or (fields[0] is None and int(number) != top):
                return None
            created, metadata, payload, digest = fields
            payload, cuts = joined(parts) if parts else (payload, ())
            return Record(int(number), float(created), metadata.decode(), payload, digest.decode(), cuts)

    def _label(self, tenant: str, session: str, version: int, now: float) -> str | None:
        found = self._run("label", tenant, now, session, version)
        return None if found is None else found.decode("utf-8", "replace")

    def _versions(self, tenant: str, session: str, now: float) -> list[int]:
        return [int(version) for version in self._read("versions", tenant, session, now)]

    def _transcript(self, tenant: str, session: str, now: float) -> list[Line]:
        count, flat = self._read("transcript", tenant, session, now)
        with _decoding(session):
            lines = [
                Line(int(version), int(place), text.decode(), digest.decode())
                for version, place, text, digest in zip(*[iter(flat)] * 4, strict=True)
            ]
            if len(lines) != int(count):
                raise damaged(session, "its transcript")
        return lines

    def _info(self, tenant: str, session: str, now: float) -> Info:
        return _info(session, self._read("info", tenant, session, now))

    def _sessions(self, tenant: str, after: str, limit: int, now: float) -> list[Info]:
        found = self._run("sessions", tenant, now, after, limit)
        return [_info(session.decode("utf-8", "replace"), fields) for session, *fields in found]

    def _usage(self, tenant: str, now: float) -> Usage:
        return Usage(*self._run("usage", tenant, now))

    # ------------------------------------------------------------------ writing

    def _create(
        self, tenant: str, session: str, record: Record | None, lines: list[Line], now: float
    ) -> None:
        with self._errors():
            self.client.sadd(_TENANTS, name_of(tenant))
        self._put(tenant, session, -1, record, lines, [], now)

    def _commit(
        self, tenant: str, session: str, record: Record, lines: list[Line], drop: list[int], now: float
    ) -> None:
        self._put(tenant, session, record.version - 1, record, lines, drop, now)

    def _put(
        self,
        tenant: str,
        session: str,
        expected: int,
        record: Record | None,
        lines: list[Line],
        drop: list[int],
        now: float,
    ) -> None:
        limits, expires = self.limits, self._expires(now)
        args: list[Any] = [session, expected, "" if expires is None else repr(expires), limits.keep]
        marked = limits.marked(record.version) if record else []
        args += [f",{','.join(map(str, versions))}," for versions in (marked, drop)]
        args += [-1 if most is None else most for most in (limits.sessions, limits.nbytes)]
        if record is None:
            args.append("")
        else:
            parts = record.parts
            payload, recipe = b"" if parts else record.payload, "".join(name for name, _ in parts)
            args += [record.version, repr(record.created), record.metadata, payload, record.digest, recipe]
            different = dict(parts)
            args += [len(different), *chain.from_iterable(different.items())]
        for line in lines:
            args += [line.version, line.place, line.text, line.digest]
        verdict, *found = self._run("write", tenant, now, *args)
        with _decoding(session):
            numbers = [int(number) for number in found]
        if verdict == b"missing":
            raise not_found(session)
        if verdict == b"exists":
            raise exists(session, numbers[0])
        if verdict == b"conflict":
            raise conflict(session, numbers[0], expected + 1)
        if verdict == b"quota":
            limits.check(Usage(*numbers))

    def _delete(self, tenant: str, session: str, now: float) -> None:
        self._read("delete", tenant, session, now)

    def _purge(self, now: float) -> int:
        with self._errors():
            tenants = self.client.smembers(_TENANTS)
            return sum(
                self._scripts["purge"](keys=["ccm:" + name.decode("ascii", "replace")], args=[repr(now)])
                for name in tenants
            )


@contextmanager
def _decoding(session: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError):
        raise damaged(session, "a value") from None


def _info(session: str, fields: list[bytes]) -> Info:
    with _decoding(session):
        version, created, updated, expires, nbytes = fields
        end = float(expires) if expires else None
        return Info(session, int(version), float(created), float(updated), end, int(nbytes))
