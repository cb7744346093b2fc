//! The tokenizer of a model file.
use super::TextError;
use super::bpe::{self, ByteLevelBpe};
use super::merge::Merger;
use super::sentencepiece::{self, SentencePiece};
use super::special::{Part, SpecialSet};
use super::split::Rules;
use super::vocabulary::{Kind, Vocabulary, optional, required};
use crate::gguf::{ModelFile, Strings};
use std::borrow::Cow;
use std::ops::Range;

/// Whether control tokens (`<|im_start|>`) are recognised in text. User-defined ones always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Their names become the tokens: for prompts that a chat template made.
    Parse,
    /// Their names are text like any other: for what a person typed, who mustn't steer the model with it.
    AsText,
}

/// Offsets have 32 bits, also where a space takes three bytes.
const LENGTH_MAX: usize = 1 << 30;

/// Turns text into token ids and back. Made once from a model file, then shared: all methods take `&self`.
///
/// Time is at most `n log n` in the length of the text, whatever it is.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    model: Model,
    /// Control, unknown and user-defined tokens.
    all: SpecialSet,
    control: SpecialSet,
    user_defined: SpecialSet,
    adds_bos: bool,
    adds_eos: bool,
}

enum Model {
    ByteLevelBpe(ByteLevelBpe),
    SentencePiece(SentencePiece),
}

impl Tokenizer {
    /// Reads `tokenizer.ggml.*`.
    pub fn from_gguf(file: &ModelFile) -> Result<Tokenizer, TextError> {
        let (vocabulary, model, adds_bos) = match required::<&str>(file, "model")? {
            "gpt2" => {
                let name = optional::<&str>(file, "pre").unwrap_or("default");
                let rules = Rules::named(name).ok_or_else(|| TextError::UnknownPreTokenizer(name.into()))?;
                let vocabulary = Vocabulary::from_gguf(file, [None; 3])?;
                let bpe = ByteLevelBpe::new(rules, required::<&Strings>(file, "merges")?, &vocabulary)?;
                (vocabulary, Model::ByteLevelBpe(bpe), rules.adds_bos)
            }
            "llama" => {
                let vocabulary = Vocabulary::from_gguf(file, [Some(1), Some(2), Some(0)])?;
                let space_prefix = optional(file, "add_space_prefix").unwrap_or(true);
                let model = Model::SentencePiece(SentencePiece::new(space_prefix, &vocabulary));
                (vocabulary, model, true)
            }
            other => return Err(TextError::UnknownModel(other.into())),
        };
        let added = |wanted: fn(Kind) -> bool| {
            let is_found = |id: &u32| vocabulary.id(vocabulary.text(*id)) == Some(*id);
            let ids = (0..vocabulary.len() as u32).filter(|id| wanted(vocabulary.kind(*id))).filter(is_found);
            SpecialSet::new(&vocabulary, ids)
        };
        Ok(Tokenizer {
            all: added(|kind| kind.is_control() || kind == Kind::UserDefined),
            control: added(Kind::is_control),
            user_defined: added(|kind| kind == Kind::UserDefined),
            adds_bos: optional(file, "add_bos_token").unwrap_or(adds_bos) && vocabulary.bos().is_some(),
            adds_eos: optional(file, "add_eos_token").unwrap_or(false) && vocabulary.eos().is_some(),
            vocabulary,
            model,
        })
    }

    /// The tokens of `text`, without BOS or EOS. Text beyond 1 GiB is cut off.
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        let text =
            &text[..(0..=text.len().min(LENGTH_MAX)).rfind(|at| text.is_char_boundary(*at)).unwrap_or(0)];
        match special {
            Special::Parse => self.encode_around(text, &[]),
            Special::AsText => self.encode_around(text, std::slice::from_ref(&(0..text.len()))),
        }
    }

    /// The tokens of `text`, control tokens recognised except in the ranges `plain`, which ascend, are disjoint and
    /// otherwise don't show.
    fn encode_around(&self, text: &str, plain: &[Range<usize>]) -> Vec<u32> {
        let mut parts: Vec<Part> = Vec::new();
        let mut add = |set: &SpecialSet, range: Range<usize>| {
            let from = range.start;
            for part in set.partition(&self.vocabulary, &text[range]) {
                match (part, parts.last_mut()) {
                    (Part::Text(range), Some(Part::Text(last))) => last.end = from + range.end,
                    (Part::Text(range), _) => parts.push(Part::Text(from + range.start..from + range.end)),
                    (token @ Part::Token(_), _) => parts.push(token),
                }
            }
        };
        let mut at = 0;
        for range in plain {
            add(&self.all, at..range.start);
            add(&self.user_defined, range.clone());
            at = range.end;
        }
        add(&self.all, at..text.len());
        let mut out = Vec::with_capacity(text.len() / 3 + 1);
        let mut merger = Merger::default();
        let mut after_special = true;
        for part in parts {
            match part {
                Part::Token(id) => out.push(id),
                Part::Text(ref range) => {
                    self.encode_text(&text[range.clone()], after_special, &mut merger, &mut out)
                }
            }
            after_special = matches!(part, Part::Token(_));
        }
        out
    }

    fn encode_text(&self, text: &str, after_special: bool, merger: &mut Merger, out: &mut Vec<u32>) {
        match &self.model {
            Model::ByteLevelBpe(bpe) => bpe.encode(&self.vocabulary, merger, text, out),
            Model::SentencePiece(model) => {
                let prefix = if model.space_prefix && after_special { " " } else { "" };
                let spaced = format!("{prefix}{text}").replace(' ', sentencepiece::SPACE);
                model.encode(&self.vocabulary, merger, &spaced, out);
            }
        }
    }

    /// The tokens of a whole prompt: with BOS and EOS where the model wants them, but not twice.
    pub fn encode_prompt(&self, text: &str, special: Special) -> Vec<u32> {
        self.completed(self.encode(text, special))
    }

    /// As [`Tokenizer::encode_prompt`] with [`Special::Parse`], but what lies in the ranges `plain` stays text.
    pub(super) fn encode_prompt_around(&self, text: &str, plain: &[Range<usize>]) -> Vec<u32> {
        self.completed(self.encode_around(text, plain))
    }

    fn completed(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.bos().filter(|bos| self.adds_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        ids.extend(self.eos().filter(|eos| self.adds_eos && ids.last() != Some(eos)));
        ids
    }

    /// Bytes of the longest name of a control token with which `text` starts.
    pub(super) fn control_at(&self, text: &str) -> Option<usize> {
        self.control.length_at(&self.vocabulary, text)
    }

    /// The text of `ids`, invalid UTF-8 replaced by U+FFFD. Control tokens have none.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        ids.iter().for_each(|id| self.append_bytes(*id, &mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token puts into the text; they may be a part of a character. Empty for control tokens and for
    /// ids that aren't tokens.
    pub fn bytes(&self, id: u32) -> Cow<'_, [u8]> {
        match self.vocabulary.kind(id) {
            Kind::UserDefined => Cow::Borrowed(self.vocabulary.text(id).as_bytes()),
            Kind::Normal | Kind::Byte => {
                let mut bytes = Vec::new();
                self.append_bytes(id, &mut bytes);
                Cow::Owned(bytes)
            }
            Kind::Control | Kind::Unknown | Kind::Unused => Cow::Borrowed(&[]),
        }
    }

    /// Appends [`Tokenizer::bytes`].
    pub fn append_bytes(&self, id: u32, out: &mut Vec<u8>) {
        let text = self.vocabulary.text(id);
        match (self.vocabulary.kind(id), &self.model) {
            (Kind::UserDefined, _) => out.extend_from_slice(text.as_bytes()),
            (Kind::Normal, Model::ByteLevelBpe(_)) => bpe::decode(text, out),
            (kind @ (Kind::Normal | Kind::Byte), _) => sentencepiece::decode(text, kind, out),
            (Kind::Control | Kind::Unknown | Kind::Unused, _) => (),
        }
    }

    /// A token as the file writes it, control tokens too: `Ġthe`, `<|im_end|>`. Empty for ids that aren't tokens.
    pub fn name(&self, id: u32) -> &str {
        self.vocabulary.text(id)
    }

    /// The token that the file writes so.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.vocabulary.id(name)
    }

    /// Whether a token steers the model and has no text.
    pub fn is_control(&self, id: u32) -> bool {
        self.vocabulary.kind(id).is_control()
    }

    /// The token that texts begin with.
    pub fn bos(&self) -> Option<u32> {
        self.vocabulary.bos()
    }

    /// The token that ends a text. There may be more that end a generation: ask [`Tokenizer::is_end`].
    pub fn eos(&self) -> Option<u32> {
        self.vocabulary.eos()
    }

    /// Whether prompts begin with BOS.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether prompts end with EOS.
    pub fn adds_eos(&self) -> bool {
        self.adds_eos
    }

    /// Whether generation ends with this token.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends().binary_search(&id).is_ok()
    }

    /// All tokens that end a generation, ascending.
    pub fn ends(&self) -> &[u32] {
        self.vocabulary.ends()
    }

    /// Number of tokens: ids are below.
    pub fn len(&self) -> usize {
        self.vocabulary.len()
    }

    /// Never: a vocabulary has tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("tokens", &self.len())
            .field("ends", &self.ends())
            .finish_non_exhaustive()
    }
}
