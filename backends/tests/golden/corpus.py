#!/usr/bin/env python3
"""Writes the strings that tokenizers are compared on: 2,000, varied, the same on every run.

    python3 backends/tests/golden/corpus.py > backends/tests/golden/corpus.json

One string a line. The goldens beside it were made by llama.cpp from exactly this file.
"""
import json

COUNT = 2000


class Random:
    """PCG-like and our own, so that the corpus doesn't depend on Python's version."""

    def __init__(self, seed):
        self.state = seed

    def below(self, limit):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % limit

    def pick(self, choices):
        return choices[self.below(len(choices))]

    def many(self, low, high, make):
        return [make() for _ in range(low + self.below(high - low + 1))]


R = Random(20)

WORDS = """the of and to in is you that it he was for on are as with his they I at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who oil its now find long down day did get come made may part Antidisestablishmentarianism naïve café
Straße façade coöperate résumé jalapeño Zürich smörgåsbord fjord Łódź Dvořák señor piñata Ελλάδα Москва Київ ǅungla İstanbul ĳsje
GPU HTTP iPhone OpenAI LaTeX WebGPU K8s x86_64 README TODO FIXME utf8 i18n l10n a11y O'Reilly rock'n'roll 'tis y'all""".split()

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's what we've always wanted, isn't it? They'd've gone; you're right: he'S NOT, SHE'LL, WE'RE.",
    "Dr. Smith paid $1,234.56 (about €1.100,00) on 2024-02-29 at 11:59 p.m.!",
    "Ich weiß nicht, was soll es bedeuten, daß ich so traurig bin.",
    "Où êtes-vous allés l'été dernier ? « Nulle part », répondit-il.",
    "El niño comió piñas; ¿por qué no? ¡Qué lástima!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを。カタカナと漢字も混ぜる。",
    "我能吞下玻璃而不伤身体。今天天气怎么样？",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요.",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني. العربيةُ مُشَكَّلَةٌ",
    "אני יכול לאכול זכוכית וזה לא מזיק לי. שָׁלוֹם",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ",
    "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती.",
    "আমি কাঁচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না।",
    "நான் கண்ணாடி சாப்பிடுவேன், அதனால் எனக்கு ஒரு கேடும் வராது.",
    "Tôi có thể ăn thủy tinh mà không hại gì.",
    "მინას ვჭამ და არა მტკივა. Կրնամ ապակի ուտել և ինծի անհանգիստ չըներ։",
    "ខ្ញុំអាចញុំកញ្ចក់បាន ដោយគ្មានបញ្ហារ ຂອ້ຍກິນແກ້ວໄດ້",
    "Pack my box with five dozen liquor jugs -- really?! \"Yes,\" she said... 'No.'",
    "x² + y² = z²; ∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε; ∑_{i=1}^{n} i = n(n+1)/2; 10⁻³ ≈ ½ ≠ ⅔, Ⅷ ① ⒈",
]

CODE = [
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n\nprint([fib(i) for i in range(10)])\n",
    "fn main() {\n    let v: Vec<u32> = (0..10).map(|x| x * x).collect();\n    println!(\"{v:?}\");\n}\n",
    "#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; i++)\n\t\tprintf(\"%d\\n\", i);\n\treturn 0;\n}\n",
    "const f = async (x) => { await fetch(`https://example.com/?q=${encodeURIComponent(x)}`); };\r\n// done\r\n",
    "SELECT u.id, COUNT(*) AS n FROM users u LEFT JOIN orders o ON o.user_id = u.id WHERE u.created_at >= '2024-01-01' GROUP BY 1;",
    "<!DOCTYPE html>\n<html lang=\"en\">\n  <body class='a b'>\n    <p>&nbsp;&copy; 2024</p>\n  </body>\n</html>",
    "public static void main(String[] args) {\n        System.out.println(\"Hello, World!\");    // greet\n}\n",
    "package main\n\nimport \"fmt\"\n\nfunc main() {\n\tfmt.Println(\"héllo\", 0xDEADBEEF, 1e-9)\n}\n",
    "{\"a\": [1, 2.5, -3e10, true, null], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "for f in *.txt; do\n  sed -i 's/foo/bar/g' \"$f\" && echo \"${f%.txt}\" | tee -a log 2>&1\ndone",
    "quicksort [] = []\nquicksort (p:xs) = quicksort [x | x <- xs, x < p] ++ [p] ++ quicksort [x | x <- xs, x >= p]",
    "\\begin{equation}\n  E = mc^2 \\quad \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}\n\\end{equation}",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done\n- [ ] todo\n\n> quote\n\n```python\nprint(1)\n```\n\n***bold*** ~~gone~~",
    "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\nspec:\n  containers:\n  - name: web\n    image: nginx:1.25\n",
    "@@ -1,4 +1,4 @@\n-old line\n+new line\n context\n\\ No newline at end of file\n",
    "class A(B, metaclass=C):\n    '''doc'''\n    x: int = 0  # comment\n\n    @property\n    def y(self) -> str: return f'{self.x!r:>10}'\n",
    "if (a&&b||!c) { x+=1; y<<=2; z>>>=3; w**=4; a?.b??c; } else if(d!==e){ /* ... */ }",
    "mov eax, [ebp+8]\nxor  ebx, ebx\n.loop:\n    dec ecx\n    jnz .loop\n",
]

EMOJI = "😀 😂 🥰 👍 👍🏽 👩‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵 ❤️ ☺️ ✂️ 1️⃣ #️⃣ 🧑🏿‍🚀 🤷‍♀️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🫠 🪿 ☀ ★ ♪ ✓ ➡️ © ™ ‼️ ⁉ 🀄 🂡".split()
URLS = [
    "https://www.example.com/path/to/page.html?query=1&other=%20x#fragment",
    "http://localhost:8080/api/v1/users/42", "ftp://ftp.example.org/~user/file.tar.gz", "mailto:someone@example.co.uk",
    "git@github.com:owner/repo.git", "C:\\Users\\name\\Documents\\file.txt", "/usr/lib/x86_64-linux-gnu/libc.so.6",
    "192.168.0.1:443", "2001:0db8:85a3::8a2e:0370:7334", "user.name+tag@sub.domain.museum", "www.пример.рф", "1.2.3-beta.4+build.5",
    "d41d8cd98f00b204e9800998ecf8427e", "550e8400-e29b-41d4-a716-446655440000", "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg==",
]
SPECIALS = """<|endoftext|> <|im_start|> <|im_end|> <bos> <eos> <pad> <unk> <mask> <s> </s> <start_of_turn> <end_of_turn> <|eot_id|>
<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|file_sep|> <repo_name> <reponame> <file_sep> <unused0>
<unused42> <unused6241> [multimodal] <start_of_image> <end_of_image> <|vision_start|> <|box_end|> <|repo_name|> <jupyter_code>
<empty_output> [PAD151933] [PAD151700] <0x0A> <0xFF> <|im_start <|im_end|><|im_start|> <<bos>> <|im_start|>> ▁ ▁▁ ▁▁▁▁ <h1> </h2>
<table> <td> </td> <b> <i> <code> <strong> <|object_ref_start|> <filename> <gh_stars> <issue_start> <unused99> <unused1000""".split()
SPACES = [" ", "  ", "   ", "    ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r", " \n", "\n ", "\t ", " \t", "\u00a0", "\u3000",
          "\u2003", "\u2028", "\u0085", "\u200b", "\u000b", "\f", "\ufeff", "        ", " " * 17, "\n" * 9, "\t" * 7, "\u1680", "\u202f"]
PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "--", "—", "–", "…", "“", "”", "‘", "’", "«", "»", "¿", "¡", "§", "¶", "•",
               "、", "。", "！", "（", "）", "「", "」", "٪", "؟", "।", "!!!", "?!", "//", "/*", "*/", "==", "!=", "->", "=>", "::", "```", "###", "\\n", "€", "£", "¥", "₿", "°", "±", "×", "÷"]
EDGES = ["", "\u0000", "\u0001\u0002\u001b[31mred\u001b[0m", "\u007f", "\ufffd", "\ufffe\uffff", "\u0300", "e\u0301", "Z̷̢a̴l̵g̶o̸", "\u202eabc\u202c", "\u200d", "\u2060",
         "\U0001f3ff", "\U0010ffff", "\ue000", "\u0378", "ﬁ ﬂ ﬀ", "Ａ１！", "ᾳ ǆ ß ẞ ı İ ſ", "ｶﾞ", "각 각", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "𒀀𒁀", "㍿ ㈱ ㊙ ℡", "a\u00adb",
         "١٢٣٤٥ ۱۲۳ १२३ ๑๒๓ 一二三 Ⅻ ⅷ ½¼¾ ²³¹ ⁴₅", "\ud7ff", "\U000e0001\U000e0061", "҈҉", "\u0ce6\u0ce7", "𑁍𑄀", "'", "''", "'s", " 's", "'S'T'RE", "’s don’t", "'l", "'r", "'ve'", "a'b'c'd",
         "0", "00", "007", "1234567890" * 4, "3.14159", "1,000,000", "1e10", "0x1F", "12½34", "1 2  3   4", "-1", "+1", "1st 2nd", "½", "a1b2c3", "٣٫١٤"]


def word():
    kind = R.below(12)
    if kind < 7:
        return R.pick(WORDS)
    if kind == 7:
        return R.pick(WORDS).upper()
    if kind == 8:
        return R.pick(WORDS).capitalize() + R.pick(WORDS).capitalize()
    if kind == 9:
        return str(R.below(10 ** (1 + R.below(9))))
    if kind == 10:
        return R.pick(WORDS) + R.pick(PUNCTUATION)
    return R.pick(PUNCTUATION) + R.pick(WORDS)


def prose():
    return " ".join(R.many(2, 14, word)) + R.pick([".", "?", "!", "", "\n", " "])


def cut(text):
    """A part of a longer text, from anywhere to anywhere."""
    start = R.below(len(text))
    return text[start : start + 10 + R.below(110)]


def mixed():
    parts = [word, lambda: R.pick(SPACES), lambda: R.pick(PUNCTUATION), lambda: R.pick(EMOJI), lambda: R.pick(EDGES), lambda: R.pick(URLS),
             lambda: cut(R.pick(SENTENCES)), lambda: R.pick(SPECIALS)]
    return "".join(R.many(2, 9, lambda: R.pick(parts)()))


def spaced():
    return "".join(R.many(1, 6, lambda: R.pick(SPACES) + (word() if R.below(3) else ""))) + R.pick(["", R.pick(SPACES)])


def special():
    return "".join(R.many(1, 5, lambda: R.pick(["", " ", "\n", word(), prose()]) + R.pick(SPECIALS))) + R.pick(["", " ", word()])


def characters():
    """Characters from anywhere in Unicode, in runs of one block."""
    out = []
    for _ in range(1 + R.below(4)):
        start = R.pick([0x20, 0x80, 0x100, 0x250, 0x370, 0x400, 0x590, 0x600, 0x900, 0xE00, 0x1000, 0x10A0, 0x1100, 0x1E00, 0x2000, 0x2100, 0x2190, 0x2460,
                        0x2600, 0x3040, 0x3100, 0x4E00, 0x9000, 0xAC00, 0xFB00, 0xFE00, 0xFF00, 0x10300, 0x1D400, 0x1F300, 0x1F600, 0x1F900, 0x20000, 0x1FA70])
        out += [chr(start + R.below(96)) for _ in range(1 + R.below(8))]
    return R.pick(["", " "]).join(out)


def long_word():
    unit = R.pick(["a", "ab", "the", "é", "漢", "🙂", "0", "12", "=", "-", "_", " ", "\n", "\t", "xyz", "'", "ก", "!?", "Aa", "\u0301", "ACGT", "🏽", "▁", "\r\n", "ѣ"])
    text = unit * (20 + R.below(120))
    if R.below(2):
        text = "".join(chr(97 + R.below(26)) for _ in range(60 + R.below(200)))
    return R.pick(["", " ", "x"]) + text + R.pick(["", ".", " y"])


MAKERS = [(prose, 14), (lambda: cut(R.pick(SENTENCES)), 12), (lambda: cut(R.pick(CODE)), 14), (mixed, 20), (spaced, 10), (special, 10), (characters, 10), (long_word, 3),
          (lambda: R.pick(URLS) + R.pick(["", " ", "\n"]) + R.pick(URLS), 3), (lambda: " ".join(R.many(1, 6, lambda: R.pick(EMOJI))), 4)]


def corpus():
    strings = EDGES + SPACES + SENTENCES + CODE + EMOJI + URLS + SPECIALS
    strings += [unit * count for unit in ["a", " ", "\n", "=", "漢", "🙂", "1"] for count in (255, 700)]
    weighted = [make for make, weight in MAKERS for _ in range(weight)]
    seen = set(strings)
    assert len(strings) < COUNT
    strings = list(dict.fromkeys(strings))
    while len(strings) < COUNT:
        text = R.pick(weighted)()
        if text not in seen:
            seen.add(text)
            strings.append(text)
    return strings


if __name__ == "__main__":
    strings = corpus()
    print("[\n" + ",\n".join(json.dumps(text) for text in strings) + "\n]")
