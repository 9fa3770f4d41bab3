r"""Tokenizes captions as the caption metrics do: Penn Treebank tokens, lower case, no punctuation.

Published BLEU and CIDEr scores of captions use the tokens of pycocoevalcap's PTBTokenizer, which
runs the PTBTokenizer of Stanford CoreNLP 3.4.1 in Java and removes punctuation. This
module returns the same tokens without Java. Its rules were inferred from the program's output.

The rules are matched against the shape of a caption, which replaces each character by one sign:

  caption = "Zoë’s ½ © 😀"
  shape   = "Zoé’s ½ § \0"

The tokens are known to differ for some texts that are rare in captions: accents as entities
(`&eacute;`), web addresses that are not separated from other words, several numbers that look like
a telephone number, and scripts whose vowel signs CoreNLP drops. CoreNLP also reads all captions as
one text. In it, a last word "No." keeps its period if the next caption begins with a number, and a
last word "b." loses its period if the next caption begins with "A". This module reads each caption
separately.
"""

from collections.abc import Iterator
import functools
import re
import unicodedata

# pycocoevalcap also lists brackets, in upper case ("-LRB-"). Its tokens are in lower case, so it
# does not remove brackets.
REMOVED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

# Signs in a shape: a non-ASCII letter or mark, a non-ASCII digit, a symbol that becomes a token,
# and a symbol that is dropped, such as an emoji. All white space becomes " ". Other characters are
# their own signs.
LETTER, DIGIT, SIGN, UNKNOWN = "é5§\0"

QUOTES = "\"'`’‘‛‹›“”«»\u0091\u0092\u0093\u0094"
DASHES = "–—―\u0096\u0097"
HYPHENS = "\u058a\u2010\u2011"
NORMALIZED = {
  "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
  "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "…": "...", "&lt;": "<", "&gt;": ">",
  "¢": "cents", "£": "#", "€": "$", "₠": "$", "¤": "$", "\u0080": "$",
  **dict.fromkeys(QUOTES, "'"), **dict.fromkeys(DASHES + HYPHENS, "-"),
}  # fmt: skip
ENTITIES = {"nbsp": " ", "apos": "'", "quot": '"', "amp": "&", "mdash": "—", "ndash": "–"}
ENTITY = re.compile(rf"&({'|'.join(ENTITIES)});", re.IGNORECASE)
# First and last character of each range of symbols that become tokens.
SIGNS = (
  "¡¡¥©¬¬®´¶¹¿¿××÷÷··\u2016\u2017\u201a\u201a\u201e\u201e\u2020\u2023\u2030\u2038\u203b\u203b"
  "\u203e\u2042\u2044\u2044\u2070\u2070\u2074\u207e\u2080\u208e\u20a4\u20a4\u2100\u2101\u2103\u2106"
  "\u2108\u2109\u2114\u2114\u2116\u2118\u211e\u2123\u2125\u2125\u2127\u2127\u2129\u2129\u212e\u212e"
  "\u213a\u213b\u2140\u2144\u214a\u214d\u214f\u214f\u2155\u215e\u2190\u2bff\u3001\u3002\u3012\u3012"
  "\u30fb\u30fb\uff01\uff0f\uff1a\uff20\uff3b\uff40\uff5b\uff65\uffe0\uffe1\uffe5\uffe6"
)

ABBREVIATIONS = (
  "adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif"
  "|capt|cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq"
  "|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan"
  "|kans|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|mt"
  "|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|pres|prof|profs|pte|pty|pvt|rd|rep|reps|rev|rt"
  "|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|ste|supt|sys|tel|tenn|thu|thurs|treas|tue|tues"
  "|univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
# Abbreviations only if they are capitalized: "Ill." is an abbreviation, but "ill." is a word.
CAPITALIZED = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
# After a single letter with a period, these words begin a sentence: "She chose plan b. He chose A."
STARTS = (
  "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last"
  "|Many|More|Mr\\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These"
  "|They|This|We|What|When|While|Yet|You"
)
BEFORE_NUMBERS = "art|ca|figs?|nos?|op|pp|prop"
SUFFIXES = (
  "bat|bmp|c|cgi|class|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt"
  "|ps|py|sql|tar|txt|wav|x|xml|zip"
)

# Parts of the rules: an apostrophe, a letter, a letter or digit.
A, L, W = "['’]", "[A-Za-zé]", "[A-Za-z0-9é]"
WORD = rf"(?:[dDlLoO]{A}(?={W}{W}))?{W}+(?:_{W}+)*"
PART = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
PLAIN = r"[A-Za-z0-9]"
INITIALS = r"(?:[A-Za-z]\.){2,}"
NAME = r"[A-Za-z][A-Za-z0-9:._-]*"
VALUE = r"(?:\"[^\"<>]*\"|'[^'<>]*')"
ADDRESS = r"[^\s\"<>|(){}\0]"
ADDRESS_END = r"[^\s\"<>|(){}\0.,!?-]"
MAIL = rf"{PLAIN}[^\s\"<>|(){{}}\0@]*@[^\s\"<>|(){{}}\0.]+(?:\.[^\s\"<>|(){{}}\0.]+)*"
EYES = r"[<>]?[:;=][-o']?"
FACE = r"[-^x=~<>']"

# Group 1 of a rule matches the token. The rest of the rule matches what must follow the token. The
# rule with the longest whole match wins. If matches are equally long, the first rule wins.
RULES = (
  # Markup and addresses.
  rf"(<[/!?]?{NAME}(?: +{NAME}(?:={VALUE})?)* *[/?]?>|<!--[^<>]*-->)",
  r"(&(?:[lL][tT]|[gG][tT]|#\d+);)",
  rf"((?i:https?)://{ADDRESS}*\.{ADDRESS}*{ADDRESS_END})",
  rf"((?:{L}{W}*\.)+(?i:com|edu|net|org)/{ADDRESS}+{ADDRESS_END})",
  rf"({MAIL}|<{MAIL}>)",
  r"(@[A-Za-z_][A-Za-z0-9_]*|#[A-Za-z]+)",
  rf"({PLAIN}+(?:\.{PLAIN}+)*\.(?i:{SUFFIXES}))(?!{W})",
  # Contractions, which become two tokens: do n't, he 's, can not, 't is.
  rf"({L}+)[nN][’'‘`][tT]",
  r"([nN][’'‘`][tT])",
  rf"({WORD}){A}(?i:s|d|m|ll|re|ve)(?!{L})",
  rf"('(?i:s|d|m|ll|re|ve))(?!{L})",
  r"(’(?i:s|d|m|ll|re|ve))",
  rf"((?i:can))(?i:not)(?!{W})",
  rf"((?i:gon|wan))(?i:na)(?!{W})",
  rf"((?i:got))(?i:ta)(?!{W})",
  rf"((?i:gim|lem))(?i:me)(?!{W})",
  rf"((?i:more))'[nN](?!{W})",
  r"('[tT])(?i:is|was)",
  # Words, words with a period before a comma, and words that are joined by a period or a slash.
  rf"({WORD}(?:-{WORD})*)",
  rf"({WORD}(?:-{WORD})*\.)[,;:]",
  rf"({L}{W}*(?:[.!?]{L}{W}*)+)",
  rf"({L}{W}*(?:[.!?]{L}{W}*)+\.)[,;:]",
  rf"({PLAIN}[A-Za-z0-9.,]*(?:-{PLAIN}+)+)",
  rf"({PLAIN}[A-Za-z0-9.,]*(?:-{PLAIN}+)+\.)[,;:]",
  rf"({PART}(?:\\?/{PART}){{1,2}})",
  r"([A-Z]+(?:[&+][A-Z]+)+)",
  r"([A-Z]+(?:[&+][A-Z]+)+\.)[,;:]",
  r"([cC]\+\+|[cCfF]#)",
  # Words with apostrophes.
  rf"([dDlLjJ]{A}|[yY]{A}(?={L}))",
  rf"([A-HJ-XZn]{A}{L}{{2,}})",
  rf"({L}+[aeiouyAEIOUY]{A}[aeiouA-Z]{L}*)",
  rf"((?i:c{A}est|c{A}mon|cap{A}n|dunkin{A}|e{A}er|ev{A}ry|li{A}l|nat{A}l|nor{A}easter))",
  rf"((?i:o{A}o|ol{A}|s{A}mores|somethin{A}))",
  rf"({A}(?i:cause|em|till?)|{A}[nN]{A}|’[nN]|'[nN](?= |$))",
  rf"({A}[2-9]0[sS]|{A}\d\d(?= |$))",
  # Abbreviations and initials.
  rf"((?i:ph\.d|{ABBREVIATIONS})\.|(?:{CAPITALIZED}|{CAPITALIZED.upper()})\.|[A-Za-z]\.)",
  rf"([A-Za-z])\. +(?:{STARTS}|{STARTS.upper()}) ",
  rf"((?i:{BEFORE_NUMBERS})\.) ?\d",
  rf"((?:{PLAIN}[A-Za-z0-9.,]*(?:-{PLAIN}+)*-)?{INITIALS}(?:-(?:{INITIALS}|{PLAIN}+))*)",
  # Numbers.
  r"([+-]?(?:\d*(?:[.,:]\d+)+|\d+))",
  r"(\d{1,4}[- ]\d{1,4}/\d{1,4})",
  r"(\(\d{2,3}\) ?\d{3,4}[- ]?\d{4,5})",
  r"([A-Z]+\$)",
  # Emoticons and signs.
  rf"({EYES}[])(\[{{|\\@])(?!{W})",
  rf"({EYES}[DdPpO])(?!{W})",
  rf"({FACE}_{FACE}|\({FACE}[_.-]{FACE}\))",
  r"([!?]+|\*+|\\\*|#+|@@+|_+|<<|>>)",
  r"(\.{3,}|-{5,}|-{2,4}|''|``|’’|‘‘)",
  r"([^ \0])",
)
PATTERNS = tuple(re.compile(rule) for rule in RULES)


def tokenize(caption: str) -> list[str]:
  """Returns the tokens that pycocoevalcap compares.

    tokenize("A dog's bowl isn't empty (yet)...") =
      ["a", "dog", "'s", "bowl", "is", "n't", "empty", "-lrb-", "yet", "-rrb-"]

  From a fraction such as "5 1/2", CoreNLP makes one token with a non-breaking space. The metrics
  split this token at the space, so this function returns two tokens.
  """
  tokens = [token for token in _lex(caption) if token not in REMOVED]
  return " ".join(tokens).split()


def _lex(caption: str) -> Iterator[str]:
  """Yields the tokens of a caption with punctuation. Replaces any quote by "'", any dash by "-"."""
  text = ENTITY.sub(lambda match: ENTITIES[match[1].lower()], caption)
  text = text.replace("\u00ad", "")  # Soft hyphen.
  shape = "".join(map(_sign, text))
  start = 0
  while start < len(shape):
    if shape[start] in (" ", UNKNOWN):
      start += 1
      continue
    matches = [match for pattern in PATTERNS if (match := pattern.match(shape, start))]
    end = max(matches, key=lambda match: match.end()).end(1)
    yield _normalize(text[start:end])
    start = end


def _normalize(token: str) -> str:
  """Returns a token in lower case and in the spelling of the Penn Treebank: "’S" becomes "'s"."""
  token = token.lower()
  if token in NORMALIZED:
    return NORMALIZED[token]
  if not token.strip(QUOTES):
    return "'"
  if re.fullmatch(r"\.+|-{2,4}", token):
    return "--" if token[0] == "-" else "..."
  if re.fullmatch(r"’(?:s|d|m|ll|re|ve)|n[’‘]t", token):
    token = token.replace("’", "'").replace("‘", "`")
  # In emoticons, only round brackets are replaced by names such as "-lrb-".
  return token.replace("(", "-lrb-").replace(")", "-rrb-")


@functools.cache
def _sign(char: str) -> str:
  """Returns the sign that replaces a character in the shape of a caption."""
  if char.isspace():
    return " "
  if char < "\u0080":
    return char if char.isprintable() else UNKNOWN
  if char in NORMALIZED:
    return "-" if char in HYPHENS else char
  category = unicodedata.category(char)
  if char > "\uffff":
    return UNKNOWN
  if category[0] == "L" or "\u02c2" <= char <= "\u02ff":
    return LETTER
  if category[0] == "M" and char < "\u0e50":  # CoreNLP drops some marks of later scripts.
    return LETTER
  if category == "Nd":
    return DIGIT
  pairs = zip(SIGNS[::2], SIGNS[1::2])
  return SIGN if any(first <= char <= last for first, last in pairs) else UNKNOWN
