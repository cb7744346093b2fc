//! A model without an engine: the logits of a text, for comparisons.
use crate::load::{self, Started};
use std::cell::RefCell;
use std::sync::Arc;
use tokio::sync::Notify;
use wasm_bindgen::prelude::*;
use weir_backends::program::{Batch, Input, Program, Segment, SegmentOutput, Want};

/// Computes logits, a piece of one text after the other.
#[wasm_bindgen]
pub struct Scorer {
    program: RefCell<Box<dyn Program>>,
    wake: Arc<Notify>,
    blocks: Arc<[u32]>,
    at: RefCell<u32>,
    about: String,
}

#[wasm_bindgen]
impl Scorer {
    /// As `Model.load`.
    pub async fn load(parts: js_sys::Array, options: String) -> Result<Scorer, JsError> {
        let Started { program, layout, info, wake, .. } = load::start(parts, &options).await?;
        Ok(Scorer {
            program: RefCell::new(program),
            wake,
            blocks: (0..layout.blocks).collect(),
            at: RefCell::new(0),
            about: info.description,
        })
    }

    /// What computes.
    pub fn about(&self) -> String {
        self.about.clone()
    }

    /// Logits of each of the next tokens, `[tokens][vocabulary]`.
    pub async fn logits(&self, ids: Vec<u32>) -> Result<Vec<f32>, JsError> {
        let n = ids.len() as u32;
        let start = self.at.replace_with(|at| *at + n);
        let input = Input::Ids(ids);
        let segment = Segment {
            slot: 0,
            start,
            prompt: false,
            input,
            blocks: self.blocks.clone(),
            want: Want::Logits(n),
        };
        self.program.borrow_mut().submit(Batch { segments: vec![segment] })?;
        let output = loop {
            let polled = self.program.borrow_mut().poll();
            match polled {
                Some(output) => break output?,
                None => self.wake.notified().await,
            }
        };
        match output.segments.into_iter().next() {
            Some(SegmentOutput::Logits(logits)) => Ok(logits),
            _ => Err(JsError::new("the program gave no logits")),
        }
    }
}
