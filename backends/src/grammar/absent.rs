//! Where there is no llguidance: every request with a grammar is refused.
use super::GrammarError;
use crate::engine::Vocabulary;
use std::sync::Arc;

/// See the other one.
#[derive(Debug)]
pub struct Grammars;

/// There is none.
#[derive(Debug)]
pub enum Masks {}

impl Grammars {
    /// Of no use.
    pub fn new(_: &Vocabulary) -> Result<Grammars, GrammarError> {
        Err(GrammarError::Absent)
    }

    /// Refuses.
    pub fn begin(&mut self, _: &str, _: &[u32]) -> Result<Masks, GrammarError> {
        Err(GrammarError::Absent)
    }
}

impl Masks {
    /// Never.
    pub fn mask(&mut self) -> Result<Arc<[u32]>, GrammarError> {
        match *self {}
    }

    /// Never.
    pub fn allowed(&mut self, _: &[u32]) -> Result<Vec<Arc<[u32]>>, GrammarError> {
        match *self {}
    }

    /// Never.
    pub fn is_done(&self) -> bool {
        match *self {}
    }

    /// Never.
    pub fn take(&mut self, _: u32) -> Result<bool, GrammarError> {
        match *self {}
    }
}
