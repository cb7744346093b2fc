//! Random policies, requests and nodes, repeated by a seed.

/// SplitMix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// What a random expression has.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Bool,
    Int,
    Float,
    Text,
}

const INTS: [&str; 8] = [
    "request.prompt_tokens",
    "request.max_tokens",
    "request.output_tokens",
    "node.running",
    "node.slots",
    "pool.queue",
    "pool.own_free",
    "time.hour",
];
const FLOATS: [&str; 7] = [
    "request.max_usd",
    "request.ttft_ms",
    "request.waited_ms",
    "node.load",
    "node.usd",
    "node.ttft_ms",
    "node.output_usd_per_mtok",
];
const TEXTS: [&str; 8] = [
    "request.priority",
    "request.model",
    "request.key",
    "node.name",
    "node.trust",
    "node.country",
    "request.tags.team",
    "node.labels['zone']",
];
const WORDS: [&str; 6] = ["'own'", "'guest'", "'blue'", "'DE'", "''", "'normal'"];

/// An expression of this type over everything that can be asked, in CEL that needs no conversions.
pub(crate) fn expression(rng: &mut Rng, kind: Kind, depth: u32, node: bool) -> String {
    let fields: &[&str] = match kind {
        Kind::Bool => &["request.private", "true", "false"],
        Kind::Int => &INTS,
        Kind::Float => &FLOATS,
        Kind::Text => &TEXTS,
    };
    if depth == 0 || (kind != Kind::Bool && rng.one_in(3)) {
        return leaf(rng, kind, fields, node);
    }
    let mut part = |rng: &mut Rng, kind| expression(rng, kind, depth - 1, node);
    if rng.one_in(8) {
        let (condition, yes, no) = (part(rng, Kind::Bool), part(rng, kind), part(rng, kind));
        return format!("({condition} ? {yes} : {no})");
    }
    match kind {
        Kind::Bool => condition(rng, &mut part),
        Kind::Int => match rng.below(6) {
            0 => format!("int({})", part(rng, Kind::Float)),
            1 => format!("size({})", part(rng, Kind::Text)),
            2 => format!("-({})", part(rng, Kind::Int)),
            _ => {
                let operator = rng.of(&["+", "-", "*", "/", "%"]);
                format!("({} {operator} {})", part(rng, Kind::Int), part(rng, Kind::Int))
            }
        },
        Kind::Float => match rng.below(5) {
            0 => format!("double({})", part(rng, Kind::Int)),
            1 => format!("-({})", part(rng, Kind::Float)),
            _ => {
                let operator = rng.of(&["+", "-", "*", "/"]);
                format!("({} {operator} {})", part(rng, Kind::Float), part(rng, Kind::Float))
            }
        },
        Kind::Text => leaf(rng, kind, fields, node),
    }
}

fn condition(rng: &mut Rng, part: &mut dyn FnMut(&mut Rng, Kind) -> String) -> String {
    match rng.below(9) {
        0 => format!("!({})", part(rng, Kind::Bool)),
        1 | 2 => {
            let sign = rng.of(&[" && ", " || "]);
            let parts: Vec<String> = (0..2 + rng.below(3)).map(|_| part(rng, Kind::Bool)).collect();
            format!("({})", parts.join(sign))
        }
        3 => format!("('{}' in request.tags)", rng.of(&["team", "private", "other"])),
        4 => {
            let kind = rng.of(&[Kind::Int, Kind::Float, Kind::Text]);
            let parts: Vec<String> = (0..rng.below(4)).map(|_| part(rng, kind)).collect();
            format!("({} in [{}])", part(rng, kind), parts.join(", "))
        }
        5 => {
            let how = rng.of(&["startsWith", "endsWith", "contains"]);
            format!("({}).{how}({})", part(rng, Kind::Text), part(rng, Kind::Text))
        }
        6 => rng.of(&["has(request.max_usd)", "has(request.ttft_ms)", "has(request.tags.team)"]).into(),
        _ => {
            let kind = rng.of(&[Kind::Int, Kind::Float, Kind::Text, Kind::Bool]);
            let sign = match kind {
                Kind::Bool => rng.of(&["==", "!="]),
                _ => rng.of(&["==", "!=", "<", "<=", ">", ">="]),
            };
            format!("({} {sign} {})", part(rng, kind), part(rng, kind))
        }
    }
}

fn leaf(rng: &mut Rng, kind: Kind, fields: &[&str], node: bool) -> String {
    if rng.one_in(3) {
        return match kind {
            Kind::Bool => rng.of(&["true", "false"]).into(),
            Kind::Int => rng.of(&["0", "1", "3", "100", "-7", "9223372036854775807"]).into(),
            Kind::Float => rng.of(&["0.0", "0.5", "1.0", "250.0", "-2.5", "1e300"]).into(),
            Kind::Text => rng.of(&WORDS).into(),
        };
    }
    let known: Vec<&str> =
        fields.iter().copied().filter(|field| node || !field.starts_with("node.")).collect();
    rng.of(&known).into()
}
