//! Grammars by llguidance.
use super::GrammarError;
use crate::engine::Vocabulary;
use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{
    ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv,
};
use llguidance::{Logger, Matcher, ParserFactory};
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use weir_scheduler::GRAMMAR_BYTES_MAX;

/// Brackets within brackets, at most: parsers recurse.
const DEPTH_MAX: usize = 96;
/// Compiled grammars that are kept: clients ask with the same schema again and again.
const KEPT: usize = 8;
/// Compiling recurses, too.
const STACK_BYTES: usize = 16 << 20;

/// What a grammar may cost.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        // 20 ms
        initial_lexer_fuel: 1_000_000,
        // 4 ms
        step_lexer_fuel: 60_000,
        // 2 ms
        step_max_items: 40_000,
        // 50 MB
        max_lexer_states: 25_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// Grammars over the tokens of one model. Making it takes tens of milliseconds and megabytes.
pub struct Grammars {
    factory: ParserFactory,
    /// Fresh ones, last used first.
    compiled: VecDeque<(Box<str>, Matcher)>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("compiled", &self.compiled.len()).finish_non_exhaustive()
    }
}

/// The tokens of a model, as a tree of their bytes.
struct Tokens(TokTrie);

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.0.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

impl Grammars {
    /// For these tokens.
    pub fn new(vocabulary: &Vocabulary) -> Result<Grammars, GrammarError> {
        let (size, mut ends) = (vocabulary.size(), Vec::new());
        let word = |id: u32| match vocabulary.is_end(id) {
            true => {
                ends.push(id);
                [&[TokTrie::SPECIAL_TOKEN_MARKER], format!("<end {id}>").as_bytes()].concat()
            }
            // Other control tokens have no bytes, and are never allowed.
            false => vocabulary.bytes(id),
        };
        let words: Vec<Vec<u8>> = (0..size).map(word).collect();
        let Some(end) = ends.first() else {
            return Err(GrammarError::Bad("the model has no token that ends its output".into()));
        };
        let trie = TokTrie::from(&TokRxInfo::new(size, *end), &words).with_eos_tokens(&ends);
        Grammars::over(Arc::new(Tokens(trie)))
    }

    fn over(tokens: TokEnv) -> Result<Grammars, GrammarError> {
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|error| GrammarError::Bad(error.to_string()))?;
        *factory.limits_mut() = limits();
        factory.quiet();
        Ok(Grammars { factory, compiled: VecDeque::new() })
    }

    /// Compiles a grammar, unless that was done already, and goes through the output so far.
    pub fn begin(&mut self, grammar: &str, output: &[u32]) -> Result<Masks, GrammarError> {
        let place = self.compiled.iter().position(|(text, _)| **text == *grammar);
        let kept = match place.and_then(|place| self.compiled.remove(place)) {
            Some(kept) => kept,
            None => (grammar.into(), self.compile(grammar)?),
        };
        // The copy's states are its own, so that no request's fill up another's.
        let mut masks = Masks { matcher: kept.1.deep_clone() };
        self.compiled.push_front(kept);
        self.compiled.truncate(KEPT);
        for id in output {
            masks.take(*id)?;
        }
        Ok(masks)
    }

    fn compile(&self, grammar: &str) -> Result<Matcher, GrammarError> {
        bounded(grammar)?;
        let init = GrammarInit::Serialized(TopLevelGrammar::from_lark(grammar.to_owned()));
        let compile = || {
            let capabilities = InferenceCapabilities::default();
            let parser =
                self.factory.create_parser_from_init_ext(init, Logger::new(0, 0), capabilities, limits());
            Matcher::new(parser)
        };
        let matcher = stacker::maybe_grow(STACK_BYTES, STACK_BYTES, compile);
        match matcher.get_error() {
            Some(error) => Err(GrammarError::Bad(short(&error))),
            None => Ok(matcher),
        }
    }
}

/// Where an output stands in its grammar.
pub struct Masks {
    matcher: Matcher,
}

impl std::fmt::Debug for Masks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Masks").finish_non_exhaustive()
    }
}

impl Masks {
    /// Which tokens may come next, as bits: at least one.
    pub fn mask(&mut self) -> Result<Arc<[u32]>, GrammarError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| mask_error(&error))?;
        match mask.as_slice().iter().any(|word| *word != 0) {
            true => Ok(mask.as_slice().into()),
            false => Err(GrammarError::Mask("nothing may come next".into())),
        }
    }

    /// What may come next, and behind each of these tokens as far as they may come: one mask more than there are tokens
    /// that may. It stays where it was.
    pub fn allowed(&mut self, tokens: &[u32]) -> Result<Vec<Arc<[u32]>>, GrammarError> {
        let mut masks = vec![self.mask()?];
        let mut taken = 0;
        for (id, mask) in tokens.iter().zip(0..) {
            let mask: &[u32] = &masks[mask];
            if mask.get(*id as usize / 32).is_none_or(|word| word >> (id % 32) & 1 == 0) {
                break;
            }
            taken += 1;
            if self.take(*id)? {
                break;
            }
            masks.push(self.mask()?);
        }
        if taken > 0 {
            self.matcher.rollback(taken).map_err(|error| mask_error(&error))?;
        }
        Ok(masks)
    }

    /// Whether nothing more may come.
    pub fn is_done(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// Takes the next token. Says whether nothing more may come.
    pub fn take(&mut self, id: u32) -> Result<bool, GrammarError> {
        if self.matcher.is_stopped() {
            return Err(GrammarError::Strayed);
        }
        self.matcher.consume_token(id).map_err(|_| GrammarError::Strayed)?;
        Ok(self.matcher.is_stopped())
    }
}

/// That what a grammar says, and whether a model's tokens could follow it, is worth compiling it for: done by compiling it
/// for single bytes. Takes time; ask off the threads that serve.
pub fn check(grammar: &str) -> Result<(), GrammarError> {
    static BYTES: OnceLock<TokEnv> = OnceLock::new();
    let bytes = BYTES.get_or_init(ApproximateTokEnv::single_byte_env);
    let grammars = Grammars::over(bytes.clone())?;
    let mut matcher = grammars.compile(grammar)?;
    matcher
        .compute_mask_or_eos()
        .map(|_: SimpleVob| ())
        .map_err(|error| GrammarError::Bad(short(&error.to_string())))
}

/// Its size and nesting.
fn bounded(grammar: &str) -> Result<(), GrammarError> {
    if grammar.len() > GRAMMAR_BYTES_MAX {
        let bytes = grammar.len();
        return Err(GrammarError::Bad(format!(
            "it has {bytes} bytes, at most {GRAMMAR_BYTES_MAX} are taken"
        )));
    }
    let (mut depth, mut most) = (0usize, 0);
    for byte in grammar.bytes() {
        match byte {
            b'{' | b'[' | b'(' => depth += 1,
            b'}' | b']' | b')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    if most > DEPTH_MAX {
        return Err(GrammarError::Bad(format!("it is nested {most} deep, at most {DEPTH_MAX} are taken")));
    }
    Ok(())
}

fn mask_error(error: &impl std::fmt::Display) -> GrammarError {
    GrammarError::Mask(short(&error.to_string()))
}

/// The first line, and not all of that: errors quote what they are about.
fn short(error: &str) -> String {
    error.lines().next().unwrap_or_default().chars().take(300).collect()
}
