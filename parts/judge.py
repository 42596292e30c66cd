"""What counts as a failure: one table, and the function that finds an answer's row in it.

An attempt ends with one word, its outcome. `VERDICTS` says of each outcome whether the next model
of the chain is tried and whether the model gets a strike; `judge` finds the outcome for what an
upstream answered. What its words say plainly outranks its status: a wrong key comes as a 400, a
prompt that is too long as a 500, an empty account as a 429. To teach the router a new kind of
failure, add a row; new words for a known one go into `SAYS`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

from parts.errors import ClassifierError, Failure, scrub
from parts.errortext import read_error, unpacked, wait_of
from parts.exchange import MAX_ERROR, Reply
from parts.table import Model, Upstream


class Verdict(NamedTuple):
    """What an outcome means: `next` is yes, no, or once (a second opinion); `strike` counts."""

    next: str
    strike: bool
    says: str


VERDICTS = {
    "connect": Verdict("yes", True, "could not be reached"),
    "tls": Verdict("yes", True, "has no valid TLS certificate"),
    "reset": Verdict("yes", True, "closed the connection"),
    "first_token": Verdict("yes", True, "sent no token in time"),
    "answer": Verdict("yes", True, "did not finish its answer in time"),
    "idle": Verdict("yes", True, "stopped in mid-answer"),
    "cut": Verdict("yes", True, "broke off in mid-answer"),
    "server_error": Verdict("yes", True, "failed"),
    "redirect": Verdict("yes", True, "answered with a redirect"),
    "not_an_answer": Verdict("yes", True, "sent something that is no answer"),
    "rate_limited": Verdict("yes", True, "is rate limited"),
    "unknown_model": Verdict("yes", True, "is not known to its upstream"),
    "not_found": Verdict("yes", False, "was not found"),
    "empty": Verdict("once", False, "sent an empty answer"),
    "not_json": Verdict("once", False, "did not answer in the JSON that was asked for"),
    "refused": Verdict("once", False, "refused the request"),
    "context_length": Verdict("yes", False, "cannot take a prompt of this length"),
    "unauthorized": Verdict("yes", False, "was refused for its key"),
    "payment": Verdict("yes", False, "wants payment"),
    "client_error": Verdict("yes", False, "refused the request"),
    "content_filter": Verdict("no", False, "refused the content"),
    "total": Verdict("no", False, "ran out of the time for the whole request"),
    "shortage": Verdict("no", False, "could not be asked: this machine is short of something"),
    "client_left": Verdict("no", False, "was left by the client"),
    "internal_error": Verdict("no", False, "met a bug of the router"),
}
DOUBTFUL = ("empty", "not_json")  # passed on when nobody has a better one
# A status whose text says nothing more. Other 3xx, 4xx and 5xx: see judge.
BY_STATUS = {
    400: "refused", 401: "unauthorized", 402: "payment", 404: "not_found", 408: "server_error",
    413: "context_length", 422: "refused", 429: "rate_limited",
}  # fmt: skip
# With which statuses an outcome goes. One that came with another, because its words outrank it, is
# told with the first of these: an empty account is a 402, whatever number it came with.
STATUSES: dict[str, tuple[int, ...]] = {
    "context_length": (400, 413, 422), "payment": (402, 403), "unauthorized": (401, 403),
    "rate_limited": (429, 503), "unknown_model": (404, 400), "content_filter": (400, 403),
    "server_error": (503, 500, 501, 502, 504, 408),
}  # fmt: skip


# --- words ---------------------------------------------------------------------------------------


GAP, DIVIDED = r"[^\n]{0,50}?(?<![a-z0-9])", r"[^a-z0-9\n]{0,3}"
KEY = (
    "(x )?(api secret|api|secret|access|subscription|auth|authentication|bearer|security|session)"
    " (key|token)"
)
PROMPT = "(prompt|inputs?|request|messages?|conversation|history|payload|entity)"
MODEL = r"models?:? ?(?!output|response|param|input)([`'\"][^`'\"\n]{1,100}[`'\"]|[\w./:@-]+)"


@cache  # at the first error: most processes never meet one, and 50 ms are much of a start
def phrases(lines: str) -> re.Pattern[str]:
    """A pattern for lower-case text that fits when one of `lines` does: a regular expression each.

    In them ` ... ` is a gap of up to 50 characters, and a blank is whatever divides words, or
    nothing: "invalid api key" is invalid_api_key and InvalidApiKey, too. ^ and $ hold all of one
    thing that an error says. Chinese knows no blanks: it fits anywhere.
    """
    found = []
    for line in filter(None, (line.strip() for line in lines.splitlines())):
        pattern = line.replace(" ... ", GAP).replace(" ", DIVIDED)
        begins_a_word = "(?<![a-z0-9])" if line.isascii() else ""
        found.append(f"{begins_a_word}(?:{pattern})")
    return re.compile("|".join(found), re.M)


class Words(NamedTuple):
    """What an error says (see `phrases`) when it means `outcome`, `unless` it says this, too.

    `only` and `never` are statuses; () is any.
    """

    outcome: str
    says: str
    only: tuple[int, ...] = ()
    never: tuple[int, ...] = ()
    unless: str = "(?!)"


# The first row that fits counts. Each was met at a provider; tests/test_judge.py says at whose.
SAYS = (
    Words("client_error", r"""
        unsupported country
        violation of provider terms
        (country|countries|region|territory|user location) ... (not|un) ?(supported|available)
        not (yet )?(available|supported|allowed) ... (your|this|the) (country|region|location)
        un(available|supported) ... (your|this|the) (country|region|location)
    """),
    Words("context_length", r"""
        context length exceeded
        context window exceeded
        context overflow
        exceed context size
        prompt tokens exceeded
        long context requests
    """),
    Words("payment", r"""
        insufficient (user|account|api|usd|token)? ?(quota|balance|credit|fund)
        insufficient \w+ (or \w+ )?balance
        not enough (balance|credit|fund|quota|money)
        (quota|balance|credits?|funds) (is|are) (insufficient|not enough|exhausted|depleted|too low)
        (credit|account) balance
        credit limit
        payment required
        arrearage
        in arrears
        requires? more credits
        (out of|no) credits?( left)?\b
        (used|exhausted|run out|ran out|consumed) ... credits\b
        included credits
        billing error
        billing not active
        billing hard limit
        check your billing details on our
        spend(ing)? limit
        overdue
        recharge
        top up
        payment method
        credit card
        requires? an? (\w+ )?subscription
        \w*resource pack(age)? exhausted
        in debt
        free (allocated )?(tier|quota) ... (exhausted|exceeded|used up|only)
        budget ?(has been )?exceeded
        over budget
        invalid subscription(?! key)
        valid coding plan
        (plan|subscription|membership) ... expired
        not (yet )?(available|include)d? ... plan\b
        plan ... (does not|doesn.t) ... include
        membership benefits
        (status|code|http) 402\b
        余额不足|余额已|欠费|额度不足|额度已|剩余额度|预扣费|充值|资源包|套餐已到期|套餐暂未开放
    """),
    Words("payment", r"""
        exceeded (your )?current (token )?quota
        check your (plan|account|billing) ... (billing|balance)
    """, unless=r"""
        resource ?(has been )?exhausted
        retry in \d
        per (day|minute)
        generate ?content
    """),  # Google's limits per minute and per day say the same as OpenAI's empty account
    Words("unauthorized", r"""
        (invalid|incorrect|wrong|missing|expired|unknown|bad|disabled|revoked|no)[\x20_-]?KEY\b
        KEY ... (invalid|not valid|incorrect|wrong|missing|expired|revoked|blocked|leaked|required)
        KEY ... (disabled|deleted|deactivated|suspended|not (found|set|provided|authori[sz]ed))
        KEY does(n.t| not) exist
        token ((has|is|was) )?(been )?(expired|revoked)
        (did ?n.t|not|must|please) (provide|pass|include|supply|specify|send|carry) ... KEY
        (access|auth|authentication|security|api) token ... (非法|已过期|的验证)
        token seems invalid
        (jwt|credentials?) ... (invalid|expired|missing|revoked|required)
        (invalid|bad|no|missing) (auth |authentication )?credentials
        invalid (authentication|authori[sz]ation|auth|bearer|jwt)\b
        (no|missing|invalid|get the) (auth|authentication|authori[sz]ation) header
        missing bearer
        credential is only authorized
        auth failure
        (validate|verify) (your )?credentials
        authori[sz]ation failed
        invalid user ?(name)? or password
        authentication (error|fail|required)
        (failed|unable|could not|cannot) (to )?(be )?authenticate
        not authenticated
        unauthenticated
        ^unauthori[sz]ed\W*$
        login fail
        key limit exceeded
        access (was |has been |is )?terminated
        account deactivated
        (account|organi[sz]ation|workspace) ... (is|was|been) (currently )?(deactivated|suspended)
        (account|organi[sz]ation|workspace) ... (is|was|been) (terminated|disabled|banned|blocked)
        (account|organi[sz]ation|workspace) ... (is|was|been) (locked|restricted|deleted)
        (error code|status|http) 401\b
        (无效|未提供|过期)的? ?(令牌|密钥|api key)
        令牌(状态不可用|无效|已过期|已失效|验证)
        (密钥|api key|token).{0,6}(无效|错误|不正确|过期|不存在|验证失败)
        身份验证失败|无法进行身份验证|认证失败|鉴权失败
        账[户号](已被|不存在|当前处于非活)
    """.replace("KEY", KEY)),
    Words("rate_limited", r"""
        rate limit
        too many (concurrent )?requests
        request rate
        too (frequent|quickly|fast)
        (requests?|calls?|qps) limit (reached|exceeded)
        throttl
        slow down
        model cooldown
        cooling down
        (requests?|tokens?|queries|calls) (\w+ )?per (second|min|hour|day)
        [rt]p[mds]\b
        quota (limit )?(exceeded|exhausted|reached)
        exceeded ... quota\b
        quota ... exceeded
        resource ?(has been )?exhausted
        concurren\w+ ... (limit|exceed|reached)
        (limit|exceed|maximum|many)\w* ... concurren
        usage limit
        (hour|hourly|daily|weekly|monthly) (usage )?limit
        limit ... reset
        capacity exceeded
        please wait ... (before|and) (try|retry)
        (error code|status|http) 429\b
        请求(过于|太|频率|过多|数过|次数)
        频率(过高|限制|超)
        限流|限速|流量限制|并发数|访问量过大|次数限额|使用上限
    """),
    Words("context_length", r"""
        max(imum)?\x20context\b
        max(imum)?\x20(prompt|input|sequence|model)[\x20-](length|size|limit|tokens?|window)
        (exceed\w*|longer|larger|greater|more than|fit) ... context (length|window|size|limit)
        context (length|window|size|limit) ... (exceed|overflow|reached|too small|is only|ran out)
        context (is )?too (long|large)
        PROMPT ((length|size|tokens?|text|contents?|body) )?((is|are|was) )?(much )?too (long|large)
        ^(?![^\n]*\b(image|file|audio|video|page|tool|name))[^\n]*\bPROMPT\b[^\n:]{0,40}?\bexceed
        (token count|number of (input |prompt )?tokens|requested tokens)[^\n:]{0,40}?\bexceed
        token count ... supports? up to
        max(imum)? input characters
        (sequence|prompt|input) length ... (longer|larger|greater) than
        exceed\w* ... (input|prompt|model|context|message) tokens?\b
        exceed\w* ... (n_ctx|max_seq_len|max_model_len)
        exceeds? the max(imum)? (allowed )?number of (input )?tokens
        (longer|larger|greater|more) than ... max(imum)? ... (length|tokens?|context|len)\b
        (longer|larger|greater|more) than ... context ... (length|tokens?|context|len)\b
        (reduce|shorten|trim) (the |your )?(length of|prompt|inputs?|messages?|context|conversation)
        range of input length
        current length is \d+ while
        token limit exceeded
        exceed\w* ... token limit
        inputs? tokens? \+ max_new_tokens
        requested [\d,]+ tokens, max
        (messages|input)[^'\n]{0,60}(content|text)'?: string too long
        '(input|prompt)': string too long
        prompt ?(超长|过长)
        输入.{0,8}(过长|超长|超出|超过)
        上下文.{0,8}(过长|超)
        tokens? ?(数量?)?超过
        超(出|过).{0,12}(上下文|最大长度|长度限制)
        请压缩上下文
    """.replace("PROMPT", PROMPT),
        unless=r"""
        ^(?![^\n]*(input|prompt|messages|maximum context))[^\n]*max_(\w{1,20}_)?tokens
        ^(?![^\n]*(input|prompt|messages|maximum context))[^\n]*output tokens
    """),  # too many tokens are wanted of the answer: the prompt may be short
    Words("context_length", "too many (input |prompt |context )?tokens", never=(429,)),
    # "does not support tools" and "no endpoints found that support ..." blame the request.
    Words("unknown_model", r"""
        model not (found|exist|available|supported|open|allowed)\b
        MODEL,? (was |is |has )?not (been |currently |yet )?(found|exist|valid|available)
        MODEL,? (was |is |has )?not (been |currently |yet )?(deployed|served|loaded)
        MODEL,? does(n.t| not) exist
        model or endpoint ... does(n.t| not) exist
        MODEL,? (has |is |was )?(been |reached its )?(deprecated|decommissioned|retired|removed)
        MODEL,? (has )?(reached its )?end of life
        MODEL,? is (disabled|blocked)
        model disabled
        not supported by (any )?provider
        access to (the )?model ... denied
        MODEL,? (has |is )?(been )?no longer
        no (endpoints|models?|deployments?|healthy deployments) (found |available )?for\b
        no available channel
        no models? loaded
        requested model is not supported
        (unknown|no such|not a valid|invalid|unsupported) model\b(?! (param|out|resp|feature))
        model identifier is invalid
        not found the model
        ^model:? ?\S*( is)? not support(ed)?\W*$
        ^model: \S+$
        (no|not have|don.t have|lacks?|not allowed to) access ... models?\b
        model access denied
        unable to access model
        not activated the model
        on demand throughput isn.t supported
        deployment not found
        not found for account
        could not find (real modelid|suitable inference)
        模型.{0,60}(不存在|无可用|已下线|未开通)
        无可用渠道|无权访问.{0,4}模型|不支持的?模型|不存在的模型|未知模型
    """.replace("MODEL", MODEL), never=(429,)),
    Words("content_filter", r"""
        content filter
        content policy
        responsible ai policy
        data inspection failed
        content exists risk
        prohibited content
        sensitive words
        new sensitive
        considered high risk
        as a result of (our|the) safety system
        敏感内容|敏感词|敏感信息|违规内容|审核不通过|涉嫌违规
    """, never=(401, 402, 404, 429)),  # it ends the walk: beyond doubt, in most statuses
    Words("content_filter", r"""
        content (management|moderation)
        moderation
        flagged(?! as deprecated)
        safety(?!_)
        responsible ai
        usage guidelines
        contain ... (inappropriate|sensitive|senstive)
        (content|prompt|input|output) ... (blocked|rejected) ... (polic|filter|safety)
        violat\w* ... (polic|guideline|terms)
        内容安全|不合规
    """, only=(400, 403)),
    Words("server_error", r"""
        overloaded
        (at (full |max |maximum )?|no )capacity
        (high|heavy) (demand|load|traffic)
        (model|service|server|system|engine) ... (is|are) (\w+ )?(busy|loading)
        too busy
        upstream connect error
        out of memory
        degraded function
        (temporarily|currently) unavailable
        service unavailable
        bad gateway
        gateway time ?out
        internal server error
        ^server_error$
        deadline exceeded
        过载|负载过高|繁忙|内部错误|服务器错误|服务暂时不可用
    """, only=(400, 403, 404, 409, 422, 424)),
    Words("unauthorized", r"""
        api key
        credential
        authenticat
        (un)?authori[sz]
        permission
        user not found
        (invalid|your) token
        token (is|was|has)\b
    """, only=(403,)),
)  # fmt: skip
OUTRANKING = (401, 402, 413, 429)  # a number in an error that says more than the status around it


def judge(status: int, text: str) -> str:
    """The outcome, a key of VERDICTS, of an upstream's status and what its error says."""
    if status >= 400 and (said := _by_words(status, text)):
        return said
    if 300 <= status < 400:
        return "redirect"
    other = (
        "server_error" if status >= 500 else "client_error" if status >= 400 else "not_an_answer"
    )
    return BY_STATUS.get(status, other)


@lru_cache(maxsize=64)  # who is down says the same each time
def _by_words(status: int, text: str) -> str:
    text = text.lower()
    for words in SAYS if text else ():
        if (words.only and status not in words.only) or status in words.never:
            continue
        if phrases(words.says).search(text) and not phrases(words.unless).search(text):
            return words.outcome
    return ""


# --- answers -------------------------------------------------------------------------------------


def failure_from(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Failure:
    """The failure that an error answer means, in any upstream's dialect.

    `body` is the answer's bytes or the JSON value in them. In a 200 and in a stream, an error
    counts by the number that it names, as if that were the status, and by its words.
    """
    said = read_error(body)
    if status < 300:
        outcome = judge(said.status, said.text) if said.status else _by_words(400, said.text)
        outcome, status = outcome or "server_error", said.status or 500
    elif status >= 400 and said.status in OUTRANKING:
        outcome = _by_words(status, said.text) or judge(said.status, "")
    else:
        outcome = judge(status, said.text)
    known = STATUSES.get(outcome, (status,))
    if status not in known and not (outcome == "server_error" and status >= 500):
        status = known[0]
    waits = outcome == "rate_limited" or status == 503
    # Who asks for more than a minute's worth will not get it a minute later.
    too_large = re.search(r"request too large", said.text, re.I)
    wait_s = wait_of(headers or {}, said) if waits and not too_large else None
    return Failure(outcome, said.message, status, wait_s)


def read_told(reply: Reply) -> bytes:
    """What an error answer holds, its first `MAX_ERROR` bytes, or what has come of it."""
    data = bytearray()
    with contextlib.suppress(Failure):  # the status is the verdict, with or without its text
        while len(data) < MAX_ERROR and (chunk := reply.read1()):
            data += chunk
    return unpacked(bytes(data[:MAX_ERROR]), reply.headers.get("content-encoding", ""))


TOLD_S = 2.0  # for the text of an error, which comes with its head; the status says enough
# Real codings; `none`, `utf-8` and the like are words of servers for no coding at all.
CODINGS = re.compile(r"gzip|deflate|compress|\bbr\b|zstd")


def check_head(reply: Reply) -> None:
    """Failure unless status and headers announce an answer that we can read."""
    status, coding = reply.status_code, reply.headers.get("content-encoding", "").lower()
    if 200 <= status <= 203 and not CODINGS.search(coding):  # what the body is decides
        return
    if status < 300:
        said = "compressed, though it was not asked for" if status <= 203 else f"status {status}"
        raise Failure("not_an_answer", said, status)
    flight = reply.flight
    flight.due = min(flight.due, (flight.clock() + TOLD_S, "told"))
    data = read_told(reply)
    if flight.why in ("client_left", "total"):
        raise Failure(flight.why, status=status)
    failure = failure_from(status, data, reply.headers)
    failure.names_usage = b"stream_options" in data or b"include_usage" in data
    raise failure


# What a finish_reason says, in the words of all servers in use. One that stands in no row ends an
# answer that there is, for an honest `eos` must not strike a good provider; see `finish_kind`.
# Those that are `open` some servers send with each event, where others send null.
FINISHES = {
    word: kind
    for kind, words in {
        "open": "null none unspecified in_progress",
        "stop": "stop end_turn stop_sequence eos eos_token end complete completed done finished "
                "stop_token pause_turn compaction",
        "calls": "tool_calls tool_use function_call tool_call",
        "length": "length max_tokens max_output_tokens max_length model_length token_limit "
                  "model_context_window_exceeded context_length incomplete",
        "filter": "content_filter content_filtered safety recitation blocklist blocked refusal "
                  "prohibited_content spii sensitive guardrail_intervened image_safety moderation",
        "failed": "error abort aborted network_error malformed_function_call malformed_response "
                  "unexpected_tool_call too_many_tool_calls insufficient_system_resource failed "
                  "failure cancelled canceled timeout overloaded unavailable",
    }.items()
    for word in words.split()
}  # fmt: skip
PLAIN_FINISHES = {"": "open"} | {word.replace("_", ""): kind for word, kind in FINISHES.items()}
FAILED_NAME = re.compile(
    "error|exception|fail|abort|overload|malformed|unavailable|time(d?)out|cancel"
)


def finish_kind(reason: str) -> str:
    """open, stop, calls, length, filter, failed, or unknown: what a finish_reason says.

    MAX_TOKENS, MaxTokens, max-tokens and FINISH_REASON_MAX_TOKENS say the same.
    """
    name = re.sub(r"[\W_]", "", reason.lower()).removeprefix("finishreason")
    known = PLAIN_FINISHES.get(name)
    return known or ("failed" if FAILED_NAME.search(name) else "unknown")


def without_answer(body: Any) -> Failure:
    """The failure that a 200 means whose body is no answer: without choices, blocks, output."""
    said = read_error(body)
    if said.message or said.status:
        return failure_from(200, body)
    return Failure("not_an_answer", "no answer in it", 200)


TELLS_ERROR = frozenset(("error", "error_type", "error_message"))  # beside choices, too


def error_of(body: Mapping[str, Any]) -> Any:
    """What in an answer, an event or a choice says that it is an error; None when nothing does."""
    told = body.get("error")
    if told and (not isinstance(told, dict) or any(told.values())):
        return body
    if body.get("object") == "error" or body.get("type") == "error":
        return body
    kind, said = body.get("error_type"), body.get("error_message")
    if kind or said:
        return {"error": {"type": kind, "message": said}}
    bare = body.get("message") or body.get("detail") or body.get("errors") or body.get("msg")
    return body if bare and "choices" not in body and not isinstance(bare, Mapping) else None


# --- the rest of the chain -----------------------------------------------------------------------


def still_worth_trying(queue: list[Model], model: Model, failures: list[Failure]) -> list[Model]:
    """What is left of the chain after the last failure."""
    outcome = failures[-1].outcome
    rule = VERDICTS[outcome].next
    if rule == "no" or (rule == "once" and [f.outcome for f in failures].count(outcome) > 1):
        return []
    if outcome == "unauthorized":
        return [other for other in queue if other.upstream != model.upstream]
    if outcome == "context_length" and model.context:
        return [other for other in queue if other.context is None or other.context > model.context]
    return queue


def mendable(failures: list[Failure]) -> Failure | None:
    """The upstream's refusal that is the client's to mend, if that is what stopped us."""
    for failure in failures:
        if failure.outcome in ("content_filter", "context_length"):
            return failure
    refusals = [failure for failure in failures if failure.status in (400, 404, 413, 422)]
    enough = len(refusals) >= 2 or len(refusals) == len(failures)
    return refusals[0] if refusals and enough else None


# --- in words ------------------------------------------------------------------------------------

# Words of which servers make what they answer on a path they do not know.
PATH_WORDS = frozenset(
    "404 error page the requested resource url path route endpoint invalid no not found cannot "
    "post get on this server was such nginx uri".split()
)


def says_nothing(text: str) -> bool:
    """True for the text of a 404 that tells no more than the status."""
    return PATH_WORDS.issuperset(re.sub(r"/\S*|[^\w\s]", " ", text.lower()).split())


def refused_key(upstream: Upstream) -> str:
    """Whose key which upstream does not take."""
    if not upstream.api_key_env:
        return f"{upstream.name} wants a key: name its variable as api_key_env in routes.json"
    return f"{upstream.api_key_env} is refused by {upstream.name}"


def sentence(model: Model, failure: Failure, said: str, endpoint: str) -> str:
    """What came of one attempt, for a person: where the next step begins.

    `said`: the upstream's own words, without any secret. `endpoint`: what was asked there.
    """
    upstream = model.upstream
    if failure.outcome == "unauthorized":
        return refused_key(upstream)
    if failure.outcome in ("connect", "tls") and said:
        return f"{upstream.name} could not be reached: {said}"
    if failure.outcome == "not_found" and says_nothing(said):
        asks = "is base_url right" + ("?" if endpoint == "/chat/completions" else ", and `speaks`?")
        return f"{upstream.base_url}{endpoint} was not found (404): {asks}"
    if failure.outcome == "payment" and said:
        return f"{model.id} wants payment: {said}"
    return f"{model.id} {VERDICTS[failure.outcome].says}"


THINK_REFUSED = "think_refused"


def ollama_trouble(base: str, model: str, status: int, data: bytes) -> ClassifierError:
    """What an error of Ollama's means for a person."""
    told = read_error(data).message
    if status == 404 and "not found" in told and "page" not in told:
        text = f"Ollama at {base} has no model {model}: ollama pull {model}"
        return ClassifierError("no_model", text)
    if status == 404:
        text = f"{base}/api/chat is not found: is Ollama's base_url right?"
        return ClassifierError("not_found", text)
    if status == 400 and "think" in told.lower():
        return ClassifierError(THINK_REFUSED, f"{model} refuses to be asked not to think")
    said = scrub(told)[:200] or "no words"
    return ClassifierError(
        f"status {status}", f"Ollama at {base} answers with status {status}: {said}"
    )
