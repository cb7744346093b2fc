//! CEL's grammar, as far as policies need it: text to a tree, with the place of each part.
//!
//! <https://github.com/google/cel-spec/blob/master/doc/langdef.md>; lambdas, bytes, unsigned numbers, messages and maps are
//! left out, and refused by name.

/// Bytes of an expression, at most.
pub(crate) const TEXT_MAX: usize = 4096;
/// How deep a tree goes, at most. `&&` and `||` in a row are one level, whatever their number.
pub(crate) const DEPTH_MAX: u32 = 48;

/// A mistake in an expression.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wrong {
    /// Bytes from the beginning of the expression.
    pub at: usize,
    pub message: String,
}

pub(crate) fn wrong<T>(at: usize, message: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong { at, message: message.into() })
}

/// A part of an expression.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ast {
    pub at: usize,
    pub kind: Kind,
    depth: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Ast>),
    Name(String),
    Member(Box<Ast>, String),
    Index(Box<Ast>, Box<Ast>),
    /// On a target, or on none.
    Call(Option<Box<Ast>>, String, Vec<Ast>),
    Not(Box<Ast>),
    Negative(Box<Ast>),
    And(Vec<Ast>),
    Or(Vec<Ast>),
    Binary(Binary, Box<Ast>, Box<Ast>),
    Choice(Box<Ast>, Box<Ast>, Box<Ast>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Binary {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Equal,
    NotEqual,
    In,
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

impl Binary {
    /// As it is written.
    pub fn sign(self) -> &'static str {
        match self {
            Binary::Less => "<",
            Binary::LessOrEqual => "<=",
            Binary::Greater => ">",
            Binary::GreaterOrEqual => ">=",
            Binary::Equal => "==",
            Binary::NotEqual => "!=",
            Binary::In => "in",
            Binary::Add => "+",
            Binary::Subtract => "-",
            Binary::Multiply => "*",
            Binary::Divide => "/",
            Binary::Remainder => "%",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// A magnitude: signs come before.
    Int(u64),
    Float(f64),
    Text(String),
    Name(String),
    Sign(&'static str),
    End,
}

const SIGNS: [&str; 24] = [
    "&&", "||", "==", "!=", "<=", ">=", "<", ">", "+", "-", "*", "/", "%", "!", "?", ":", ".", ",", "(", ")",
    "[", "]", "{", "}",
];

/// CEL keeps these for itself.
const RESERVED: [&str; 17] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];

/// The tree of an expression.
pub(crate) fn parse(text: &str) -> Result<Ast, Wrong> {
    if text.len() > TEXT_MAX {
        return wrong(0, format!("the expression has {} bytes; at most {TEXT_MAX}", text.len()));
    }
    let mut parser = Parser { tokens: tokens(text)?, next: 0, inside: 0 };
    let tree = parser.choice()?;
    match parser.peek() {
        Token::End => Ok(tree),
        other => wrong(parser.at(), format!("{} is unexpected here: the expression could end", shown(other))),
    }
}

fn shown(token: &Token) -> String {
    match token {
        Token::Int(n) => n.to_string(),
        Token::Float(x) => x.to_string(),
        Token::Text(text) => format!("{text:?}"),
        Token::Name(name) => format!("`{name}`"),
        Token::Sign(sign) => format!("`{sign}`"),
        Token::End => "the end".into(),
    }
}

struct Parser {
    tokens: Vec<(usize, Token)>,
    next: usize,
    /// Brackets, signs and choices that are open.
    inside: u32,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.next].1
    }

    fn at(&self) -> usize {
        self.tokens[self.next].0
    }

    fn take(&mut self) -> Token {
        let token = self.tokens[self.next].1.clone();
        // The end stays.
        self.next = (self.next + 1).min(self.tokens.len() - 1);
        token
    }

    fn takes(&mut self, sign: &str) -> bool {
        let is = matches!(self.peek(), Token::Sign(s) if *s == sign);
        if is {
            self.take();
        }
        is
    }

    fn must(&mut self, sign: &str, after: &str) -> Result<(), Wrong> {
        match self.takes(sign) {
            true => Ok(()),
            false => wrong(self.at(), format!("`{sign}` is missing {after}, before {}", shown(self.peek()))),
        }
    }

    /// Something within something: only so deep.
    fn deeper<T>(&mut self, part: impl FnOnce(&mut Parser) -> Result<T, Wrong>) -> Result<T, Wrong> {
        if self.inside >= DEPTH_MAX {
            return wrong(self.at(), too_deep());
        }
        self.inside += 1;
        let part = part(self);
        self.inside -= 1;
        part
    }

    fn choice(&mut self) -> Result<Ast, Wrong> {
        let at = self.at();
        let condition = self.or()?;
        if !self.takes("?") {
            return Ok(condition);
        }
        self.deeper(|p| {
            let yes = p.or()?;
            p.must(":", "after the first value of the choice")?;
            let no = p.choice()?;
            node(at, Kind::Choice(Box::new(condition), Box::new(yes), Box::new(no)))
        })
    }

    fn or(&mut self) -> Result<Ast, Wrong> {
        self.row("||", Parser::and, Kind::Or)
    }

    fn and(&mut self) -> Result<Ast, Wrong> {
        self.row("&&", Parser::relation, Kind::And)
    }

    fn row(
        &mut self,
        sign: &str,
        part: fn(&mut Parser) -> Result<Ast, Wrong>,
        make: fn(Vec<Ast>) -> Kind,
    ) -> Result<Ast, Wrong> {
        let at = self.at();
        let first = part(self)?;
        let mut parts = vec![first];
        while self.takes(sign) {
            parts.push(part(self)?);
        }
        match parts.len() {
            1 => Ok(parts.remove(0)),
            _ => node(at, make(parts)),
        }
    }

    fn relation(&mut self) -> Result<Ast, Wrong> {
        let all = [
            Binary::LessOrEqual,
            Binary::GreaterOrEqual,
            Binary::Less,
            Binary::Greater,
            Binary::Equal,
            Binary::NotEqual,
            Binary::In,
        ];
        self.left_to_right(&all, Parser::sum)
    }

    fn sum(&mut self) -> Result<Ast, Wrong> {
        self.left_to_right(&[Binary::Add, Binary::Subtract], Parser::product)
    }

    fn product(&mut self) -> Result<Ast, Wrong> {
        self.left_to_right(&[Binary::Multiply, Binary::Divide, Binary::Remainder], Parser::unary)
    }

    fn left_to_right(
        &mut self,
        operators: &[Binary],
        part: fn(&mut Parser) -> Result<Ast, Wrong>,
    ) -> Result<Ast, Wrong> {
        let mut left = part(self)?;
        loop {
            let at = self.at();
            let found = operators.iter().find(|operator| match self.peek() {
                Token::Sign(sign) => *sign == operator.sign(),
                Token::Name(name) => **operator == Binary::In && name == "in",
                _ => false,
            });
            let Some(operator) = found else { return Ok(left) };
            self.take();
            let right = part(self)?;
            left = node(at, Kind::Binary(*operator, Box::new(left), Box::new(right)))?;
        }
    }

    fn unary(&mut self) -> Result<Ast, Wrong> {
        let at = self.at();
        if self.takes("!") {
            let inner = self.deeper(Parser::unary)?;
            return node(at, Kind::Not(Box::new(inner)));
        }
        if !self.takes("-") {
            return self.member();
        }
        // The least number has no positive twin.
        if let Token::Int(magnitude) = *self.peek() {
            self.take();
            let Some(value) = 0i64.checked_sub_unsigned(magnitude) else { return wrong(at, too_large()) };
            let number = node(at, Kind::Int(value))?;
            return self.members_of(number);
        }
        let inner = self.deeper(Parser::unary)?;
        match inner.kind {
            Kind::Float(value) => node(at, Kind::Float(-value)),
            _ => node(at, Kind::Negative(Box::new(inner))),
        }
    }

    fn member(&mut self) -> Result<Ast, Wrong> {
        let first = self.primary()?;
        self.members_of(first)
    }

    fn members_of(&mut self, mut of: Ast) -> Result<Ast, Wrong> {
        loop {
            let at = self.at();
            if self.takes(".") {
                let (at, name) = (self.at(), self.name("after the dot")?);
                of = match self.takes("(") {
                    true => {
                        let arguments = self.list(")")?;
                        node(at, Kind::Call(Some(Box::new(of)), name, arguments))?
                    }
                    false => node(at, Kind::Member(Box::new(of), name))?,
                };
            } else if self.takes("[") {
                let index = self.deeper(Parser::choice)?;
                self.must("]", "after the index")?;
                of = node(at, Kind::Index(Box::new(of), Box::new(index)))?;
            } else {
                return Ok(of);
            }
        }
    }

    fn name(&mut self, place: &str) -> Result<String, Wrong> {
        let at = self.at();
        match self.take() {
            Token::Name(name) => Ok(name),
            other => wrong(at, format!("a name is missing {place}, before {}", shown(&other))),
        }
    }

    fn primary(&mut self) -> Result<Ast, Wrong> {
        let at = self.at();
        match self.take() {
            Token::Int(magnitude) => match i64::try_from(magnitude) {
                Ok(value) => node(at, Kind::Int(value)),
                Err(_) => wrong(at, too_large()),
            },
            Token::Float(value) => node(at, Kind::Float(value)),
            Token::Text(text) => node(at, Kind::Text(text)),
            Token::Name(name) => self.named(at, name),
            Token::Sign("(") => {
                let inner = self.deeper(Parser::choice)?;
                self.must(")", "after the part in brackets")?;
                Ok(inner)
            }
            Token::Sign("[") => {
                let parts = self.list("]")?;
                node(at, Kind::List(parts))
            }
            Token::Sign("{") => wrong(at, "maps can't be written here; compare tags one by one"),
            Token::Sign("=") => wrong(at, "`=` is no comparison; use `==`"),
            other => wrong(at, format!("a value is missing before {}", shown(&other))),
        }
    }

    fn named(&mut self, at: usize, name: String) -> Result<Ast, Wrong> {
        match name.as_str() {
            "true" | "false" => node(at, Kind::Bool(name == "true")),
            "null" => wrong(at, "nothing is null here; ask `has(...)` whether a field is there"),
            "in" => wrong(at, "a value is missing before `in`"),
            "and" | "or" | "not" if !matches!(self.peek(), Token::Sign("." | "(")) => {
                let sign =
                    ["&&", "||", "!"][["and", "or", "not"].iter().position(|n| *n == name).unwrap_or(0)];
                wrong(at, format!("`{name}` is written `{sign}`"))
            }
            reserved if RESERVED.contains(&reserved) => wrong(at, format!("`{name}` is a reserved word")),
            _ if self.takes("(") => {
                let arguments = self.list(")")?;
                node(at, Kind::Call(None, name, arguments))
            }
            _ => node(at, Kind::Name(name)),
        }
    }

    fn list(&mut self, end: &str) -> Result<Vec<Ast>, Wrong> {
        let mut parts = Vec::new();
        loop {
            if self.takes(end) {
                return Ok(parts);
            }
            parts.push(self.deeper(Parser::choice)?);
            if !self.takes(",") {
                self.must(end, "at the end of the list")?;
                return Ok(parts);
            }
        }
    }
}

fn too_deep() -> String {
    format!("the expression is nested more than {DEPTH_MAX} deep")
}

fn too_large() -> String {
    "the number doesn't fit 64 bits".into()
}

fn node(at: usize, kind: Kind) -> Result<Ast, Wrong> {
    let deepest = |parts: &[Ast]| parts.iter().map(|part| part.depth).max().unwrap_or(0);
    let depth = 1 + match &kind {
        Kind::List(parts) | Kind::And(parts) | Kind::Or(parts) => deepest(parts),
        Kind::Member(of, _) | Kind::Not(of) | Kind::Negative(of) => of.depth,
        Kind::Index(a, b) | Kind::Binary(_, a, b) => a.depth.max(b.depth),
        Kind::Call(target, _, arguments) => deepest(arguments).max(target.as_ref().map_or(0, |t| t.depth)),
        Kind::Choice(a, b, c) => a.depth.max(b.depth).max(c.depth),
        _ => 0,
    };
    match depth > DEPTH_MAX {
        true => wrong(at, too_deep()),
        false => Ok(Ast { at, kind, depth }),
    }
}

fn tokens(text: &str) -> Result<Vec<(usize, Token)>, Wrong> {
    let bytes = text.as_bytes();
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let byte = bytes[at];
        if byte.is_ascii_whitespace() {
            at += 1;
        } else if text[at..].starts_with("//") {
            at += text[at..].find('\n').unwrap_or(text.len() - at);
        } else if let Some((token, end)) = string(text, at)? {
            found.push((at, token));
            at = end;
        } else if byte.is_ascii_digit() || (byte == b'.' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit))
        {
            let (token, end) = number(text, at)?;
            found.push((at, token));
            at = end;
        } else if byte.is_ascii_alphabetic() || byte == b'_' {
            let rest = &text[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            found.push((at, Token::Name(rest[..end].to_owned())));
            at += end;
        } else {
            let Some(sign) = SIGNS.iter().find(|sign| text[at..].starts_with(**sign)) else {
                return stray(text, at);
            };
            found.push((at, Token::Sign(sign)));
            at += sign.len();
        }
    }
    found.push((text.len(), Token::End));
    Ok(found)
}

fn stray<T>(text: &str, at: usize) -> Result<T, Wrong> {
    let stray = text[at..].chars().next().unwrap_or(' ');
    match stray {
        '=' => wrong(at, "`=` is no comparison; use `==`"),
        '&' => wrong(at, "`&` is written `&&`"),
        '|' => wrong(at, "`|` is written `||`"),
        '“' | '”' | '‘' | '’' => wrong(at, "this is a typographic quote; use ' or \""),
        _ => wrong(at, format!("{stray:?} means nothing here")),
    }
}

fn number(text: &str, at: usize) -> Result<(Token, usize), Wrong> {
    let rest = &text[at..];
    let token = if let Some(digits) = rest.strip_prefix("0x").or_else(|| rest.strip_prefix("0X")) {
        let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
        let value = u64::from_str_radix(&digits[..end], 16);
        (Token::Int(value.or_else(|_| wrong(at, too_large()))?), at + 2 + end)
    } else {
        let digits = |from: usize| from + rest[from..].bytes().take_while(u8::is_ascii_digit).count();
        let mut end = digits(0);
        let whole = end;
        if rest[end..].starts_with('.') && rest[end + 1..].starts_with(|c: char| c.is_ascii_digit()) {
            end = digits(end + 1);
        }
        if rest[end..].starts_with(['e', 'E']) {
            let signed = end + 1 + usize::from(rest[end + 1..].starts_with(['+', '-']));
            if digits(signed) > signed {
                end = digits(signed);
            }
        }
        match end == whole {
            true => match rest[..end].parse() {
                Ok(value) => (Token::Int(value), at + end),
                Err(_) => return wrong(at, too_large()),
            },
            false => match rest[..end].parse::<f64>() {
                Ok(value) if value.is_finite() => (Token::Float(value), at + end),
                _ => return wrong(at, "the number is too large"),
            },
        }
    };
    match text[token.1..].chars().next() {
        Some('u' | 'U') => wrong(token.1, "numbers have no `u` here: none is unsigned"),
        Some(c) if c.is_alphanumeric() || c == '_' => wrong(token.1, "a number ends before this"),
        _ => Ok(token),
    }
}

/// A string that begins here, if one does.
fn string(text: &str, at: usize) -> Result<Option<(Token, usize)>, Wrong> {
    let mark = text[at..].find(['\'', '"']).unwrap_or(3);
    let prefix = text[at..].get(..mark).filter(|_| mark < 3).unwrap_or("-");
    let raw = match prefix {
        "" => false,
        "r" | "R" => true,
        "b" | "B" | "br" | "rb" | "bR" | "Rb" | "BR" | "RB" | "Br" | "rB" => {
            return wrong(at, "there are no bytes here, only strings");
        }
        _ => return Ok(None),
    };
    let open = &text[at + mark..];
    let quote = &open[..1];
    let triple = open.starts_with(&quote.repeat(3));
    let close = quote.repeat(if triple { 3 } else { 1 });
    let (mut value, mut here) = (String::new(), at + mark + close.len());
    loop {
        let rest = &text[here..];
        if rest.starts_with(&close) {
            return Ok(Some((Token::Text(value), here + close.len())));
        }
        match rest.chars().next() {
            None => return wrong(at, format!("the string has no end: {close} is missing")),
            Some('\n' | '\r') if !triple => return wrong(at, "the string isn't closed on its line"),
            Some('\\') if !raw => {
                let (c, length) = escape(rest, here)?;
                value.push(c);
                here += length;
            }
            Some(c) => {
                value.push(c);
                here += c.len_utf8();
            }
        }
    }
}

/// The character that an escape stands for, and its length.
fn escape(rest: &str, at: usize) -> Result<(char, usize), Wrong> {
    let code = |from: usize, digits: usize, radix: u32| {
        let value = rest.get(from..from + digits).filter(|d| d.chars().all(|c| c.is_digit(radix)));
        let value = value.and_then(|digits| u32::from_str_radix(digits, radix).ok()).and_then(char::from_u32);
        value.map(|c| (c, from + digits))
    };
    let found = match rest.as_bytes().get(1) {
        Some(b'a') => Some(('\u{7}', 2)),
        Some(b'b') => Some(('\u{8}', 2)),
        Some(b'f') => Some(('\u{c}', 2)),
        Some(b'n') => Some(('\n', 2)),
        Some(b'r') => Some(('\r', 2)),
        Some(b't') => Some(('\t', 2)),
        Some(b'v') => Some(('\u{b}', 2)),
        Some(c @ (b'\\' | b'\'' | b'"' | b'`' | b'?')) => Some((char::from(*c), 2)),
        Some(b'x' | b'X') => code(2, 2, 16),
        Some(b'u') => code(2, 4, 16),
        Some(b'U') => code(2, 8, 16),
        Some(b'0'..=b'3') => code(1, 3, 8),
        _ => None,
    };
    found.map_or_else(|| wrong(at, "this escape means nothing; a backslash itself is \\\\"), Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Kind) {
        let got = parse(text).unwrap_or_else(|wrong| panic!("{text}: {wrong:?}"));
        assert_eq!(got.kind, expected, "{text}");
    }

    fn check_wrong(text: &str, at: usize, part: &str) {
        let wrong = parse(text).unwrap_err();
        assert!(wrong.message.contains(part) && wrong.at == at, "{text}: {wrong:?}");
    }

    #[test]
    fn literals() {
        check("12", Kind::Int(12));
        check("0x1F", Kind::Int(31));
        check("-9223372036854775808", Kind::Int(i64::MIN));
        check("1.5e3", Kind::Float(1500.0));
        check(".5", Kind::Float(0.5));
        check("-2.5", Kind::Float(-2.5));
        check("'a'", Kind::Text("a".into()));
        check(r#""a\n\x41\u00e9\"""#, Kind::Text("a\nAé\"".into()));
        check(r"r'\d'", Kind::Text(r"\d".into()));
        check("'''two\nlines'''", Kind::Text("two\nlines".into()));
        check("true // because", Kind::Bool(true));
    }

    #[test]
    fn precedence() {
        let shape = |text: &str| format!("{:?}", parse(text).unwrap().kind);
        let places = |text: String| text.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
        let same = |a: &str, b: &str| assert_eq!(places(shape(a)), places(shape(b)), "{a}");
        same("a || b && c", "a || (b && c)");
        same("!a.b && c", "(!(a.b)) && c");
        same("a + b * c < d", "(a + (b * c)) < d");
        same("a - b - c", "(a - b) - c");
        same("a ? b : c ? d : e", "a ? b : (c ? d : e)");
        same("a in b && c", "(a in b) && c");
    }

    #[test]
    fn mistakes_have_places() {
        check_wrong("a = b", 2, "use `==`");
        check_wrong("a &", 2, "written `&&`");
        check_wrong("a and b", 2, "unexpected");
        check_wrong("not b", 0, "written `!`");
        check_wrong("(a", 2, "`)` is missing");
        check_wrong("a b", 2, "unexpected");
        check_wrong("'a", 0, "no end");
        check_wrong("null", 0, "has(");
        check_wrong("5u", 1, "unsigned");
        check_wrong("b'x'", 0, "bytes");
        check_wrong("{'a': 1}", 0, "maps");
        check_wrong("9223372036854775808", 0, "64 bits");
        check_wrong(r"'\q'", 1, "escape");
        check_wrong("", 0, "missing");
        check_wrong(&"(".repeat(100), 49, "deep");
        check_wrong(&"!".repeat(3000), 49, "deep");
        check_wrong(&format!("a{}", ".b".repeat(100)), 96, "deep");
        check_wrong(&format!("a{}", "+b".repeat(100)), 95, "deep");
        check_wrong(&" ".repeat(5000), 0, "at most 4096");
        let long = format!("a{}", " && b".repeat(800));
        assert!(parse(&long).is_ok(), "a long row is not deep");
    }
}
