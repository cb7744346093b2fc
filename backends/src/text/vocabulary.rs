//! What a model file says about its tokens: their texts, scores, kinds, and which of them have a role.
use super::TextError;
use super::index::TextIndex;
use crate::gguf::{Array, FromValue, ModelFile, Strings, Value};

/// A token's text may have this many bytes; real ones have up to about 400. Bounds what a look-up costs.
const TEXT_BYTES_MAX: usize = 1024;

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    fn from_file(number: i32) -> Kind {
        match number {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            6 => Kind::Byte,
            _ => Kind::Unused,
        }
    }

    /// Whether it has no text of its own: it steers the model.
    pub(super) fn is_control(self) -> bool {
        matches!(self, Kind::Control | Kind::Unknown)
    }
}

/// Names that end a turn or the text, whatever the file says of them. The list is llama.cpp's.
const ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Roles in filling in the middle, by which of a file's keys and names a token has them.
struct FillRole {
    keys: [&'static str; 2],
    names: &'static [&'static str],
    ends: bool,
}

const FILL_ROLES: [FillRole; 6] = [
    FillRole {
        keys: ["fim_pre_token_id", "prefix_token_id"],
        names: &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
        ends: false,
    },
    FillRole {
        keys: ["fim_suf_token_id", "suffix_token_id"],
        names: &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
        ends: false,
    },
    FillRole {
        keys: ["fim_mid_token_id", "middle_token_id"],
        names: &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
        ends: false,
    },
    FillRole {
        keys: ["fim_pad_token_id", ""],
        names: &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
        ends: true,
    },
    FillRole {
        keys: ["fim_rep_token_id", ""],
        names: &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
        ends: true,
    },
    FillRole { keys: ["fim_sep_token_id", ""], names: &["<|file_sep|>"], ends: true },
];

/// Everything that `tokenizer.ggml.*` says of single tokens.
pub(super) struct Vocabulary {
    texts: Strings,
    index: TextIndex,
    /// Empty where the file has none: all are 0.
    scores: Vec<f32>,
    kinds: Vec<Kind>,
    longest: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    /// Ascending.
    ends: Vec<u32>,
}

impl Vocabulary {
    /// `defaults` are the BOS, EOS and unknown token where the file names none.
    pub(super) fn from_gguf(file: &ModelFile, defaults: [Option<u32>; 3]) -> Result<Vocabulary, TextError> {
        let texts = required::<&Strings>(file, "tokens")?.clone();
        let longest = texts.iter().map(str::len).max().unwrap_or(0);
        if texts.is_empty() || longest > TEXT_BYTES_MAX {
            let why = format!("{} tokens, of up to {longest} bytes; {TEXT_BYTES_MAX} may be", texts.len());
            return Err(TextError::BadVocabulary(why));
        }
        let mut vocabulary = Vocabulary {
            index: TextIndex::new(&texts),
            scores: scores(file, texts.len())?,
            kinds: kinds(file, texts.len())?,
            texts,
            longest,
            bos: None,
            eos: None,
            unknown: None,
            ends: Vec::new(),
        };
        let role = |name, default: Option<u32>| vocabulary.role(file, name).or(default);
        let [bos, eos, unknown] = defaults;
        let (bos, eos, unknown) =
            (role("bos_token_id", bos), role("eos_token_id", eos), role("unknown_token_id", unknown));
        let in_range = |id: &u32| (*id as usize) < vocabulary.len();
        let (bos, eos, unknown) = (bos.filter(in_range), eos.filter(in_range), unknown.filter(in_range));
        (vocabulary.bos, vocabulary.eos, vocabulary.unknown) = (bos, eos, unknown);
        vocabulary.find_ends(file);
        Ok(vocabulary)
    }

    /// The token that the file gives a role to, if it is in range.
    fn role(&self, file: &ModelFile, name: &str) -> Option<u32> {
        let id = optional::<u32>(file, name)?;
        ((id as usize) < self.len()).then_some(id)
    }

    /// Finds the tokens that end a generation, and makes control tokens of those that go by a known name.
    fn find_ends(&mut self, file: &ModelFile) {
        let mut ends = Vec::new();
        for role in &FILL_ROLES {
            let by_key = role.keys.iter().filter(|key| !key.is_empty()).find_map(|key| self.role(file, key));
            let by_name = || role.names.iter().filter_map(|name| self.id(name)).min();
            let found = by_key.or_else(by_name);
            if by_key.is_none() {
                found.iter().for_each(|id| self.kinds[*id as usize] = Kind::Control);
            }
            ends.extend(found.filter(|_| role.ends));
        }
        for id in self.ids(&ENDS) {
            self.kinds[id as usize] = Kind::Control;
            ends.push(id);
        }
        // gpt-oss: parts of a message that the reader must see
        for id in self.ids(&["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"]) {
            self.kinds[id as usize] = Kind::UserDefined;
        }
        ends.extend(self.eos);
        ends.extend(self.role(file, "eot_token_id"));
        ends.extend(self.role(file, "eom_token_id"));
        self.keep_as_text(
            &mut ends,
            "<|end|>",
            &[
                ["<|return|>", "<|call|>"],
                ["<|return|>", "<|calls|>"],
                ["<|flush|>", "<|call|>"],
                ["<|flush|>", "<|calls|>"],
            ],
        );
        self.keep_as_text(&mut ends, "</s>", &[["<|tool_response>"; 2], ["<|plamo:eos|>"; 2]]);
        ends.sort_unstable();
        ends.dedup();
        self.ends = ends;
    }

    /// In vocabularies whose ends include all of one of `sets`, `name` isn't an end.
    fn keep_as_text(&mut self, ends: &mut Vec<u32>, name: &str, sets: &[[&str; 2]]) {
        let is_end = |name: &&str| self.id(name).is_some_and(|id| ends.contains(&id));
        let Some(id) = self.id(name) else { return };
        if ends.contains(&id) && sets.iter().any(|set| set.iter().all(is_end)) {
            ends.retain(|end| *end != id);
            self.kinds[id as usize] = if name == "</s>" { Kind::Normal } else { Kind::UserDefined };
        }
    }

    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }

    /// Bytes of the longest text.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.index.get(&self.texts, text)
    }

    fn ids(&self, texts: &[&str]) -> Vec<u32> {
        texts.iter().filter_map(|text| self.id(text)).collect()
    }

    /// As the file has it; empty if there is no such token.
    pub(super) fn text(&self, id: u32) -> &str {
        self.texts.get(id as usize).unwrap_or_default()
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Unused)
    }

    pub(super) fn score(&self, id: u32) -> f32 {
        self.scores.get(id as usize).copied().unwrap_or(0.0)
    }

    pub(super) fn bos(&self) -> Option<u32> {
        self.bos
    }

    pub(super) fn eos(&self) -> Option<u32> {
        self.eos
    }

    pub(super) fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    pub(super) fn ends(&self) -> &[u32] {
        &self.ends
    }
}

fn scores(file: &ModelFile, tokens: usize) -> Result<Vec<f32>, TextError> {
    let scores = match file.get(&key("scores")) {
        None => return Ok(Vec::new()),
        Some(Value::Array(Array::F32(scores))) => scores.clone(),
        Some(Value::Array(Array::I32(scores))) => scores.iter().map(|score| *score as f32).collect(),
        Some(_) => return Err(missing("scores", "array of 32-bit numbers")),
    };
    match scores.len() >= tokens {
        true => Ok(scores),
        false => Err(TextError::BadVocabulary(format!("{tokens} tokens but {} scores", scores.len()))),
    }
}

fn kinds(file: &ModelFile, tokens: usize) -> Result<Vec<Kind>, TextError> {
    let kinds: Vec<Kind> = match file.get(&key("token_type")) {
        None => return Ok(vec![Kind::Normal; tokens]),
        Some(Value::Array(Array::I32(kinds))) => kinds.iter().map(|kind| Kind::from_file(*kind)).collect(),
        Some(_) => return Err(missing("token_type", "array of 32-bit integers")),
    };
    match kinds.len() >= tokens {
        true => Ok(kinds),
        false => Err(TextError::BadVocabulary(format!("{tokens} tokens but {} types", kinds.len()))),
    }
}

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

fn missing(name: &str, wanted: &'static str) -> TextError {
    TextError::Missing { key: key(name), wanted }
}

/// The value of `tokenizer.ggml.NAME`.
pub(super) fn required<'a, T: FromValue<'a>>(file: &'a ModelFile, name: &str) -> Result<T, TextError> {
    optional(file, name).ok_or_else(|| missing(name, T::NAME))
}

/// The value of `tokenizer.ggml.NAME`, if it is there and of that type.
pub(super) fn optional<'a, T: FromValue<'a>>(file: &'a ModelFile, name: &str) -> Option<T> {
    file.get(&key(name)).and_then(T::from_value)
}
