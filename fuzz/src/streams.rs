//! Takes any bytes for what a provider streams: no panic, no overflow, no memory that the bytes don't account for; and wherever
//! the network cuts them, the same comes of them.
//!
//! The first byte chooses the dialect, the second where the bytes are cut.
#![no_main]
#![allow(dead_code, unused_imports)] // the sources are whole, and not all of them is used here

// Compiled from the sources, not through the crate: builds in seconds, and instruments nothing else.
#[path = "../../upstream/src/anthropic.rs"]
mod anthropic;
#[path = "../../upstream/src/ask.rs"]
mod ask;
#[path = "../../upstream/src/catalog.rs"]
mod catalog;
#[path = "../../upstream/src/openai.rs"]
mod openai;
#[path = "../../upstream/src/sse.rs"]
mod sse;
#[path = "../../upstream/src/told.rs"]
mod told;

use told::{Fault, Piece, Reader, Told};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let [dialect, cut, bytes @ ..] = bytes else { return };
    let reader = || match dialect % 5 {
        0 => Reader::OpenAi(openai::Reader),
        which => Reader::Anthropic(anthropic::Reader::new(which % 2 == 0, which > 2)),
    };
    let whole = read(reader(), bytes, bytes.len().max(1));
    let pieces = read(reader(), bytes, usize::from(*cut).max(1));
    assert_eq!(whole, pieces, "cut at every {cut}");
});

/// All that came, as one, how it ended, and what went wrong.
fn read(mut reader: Reader, bytes: &[u8], cut: usize) -> (Piece, String, Option<String>) {
    let (mut events, mut told) = (sse::Events::default(), Told::default());
    let mut wrong = None;
    for chunk in bytes.chunks(cut) {
        wrong = match events.push(chunk, |data| reader.take(data, &mut told)) {
            Ok(Ok(())) => continue,
            Ok(Err(sse::TooLong)) => Some("too long".to_owned()),
            Err(Fault::Nonsense(message) | Fault::Said { message, .. }) => Some(message),
        };
        break;
    }
    let mut all = Piece::default();
    for piece in std::mem::take(&mut told.pieces) {
        all.merge(piece);
    }
    // What isn't UTF-8 becomes marks of three bytes, and an escape of six bytes is no more than that.
    assert!(all.text.len() <= 3 * bytes.len(), "{} bytes of text from {}", all.text.len(), bytes.len());
    let prices = catalog::Prices { prompt: 1e6, output: 1e6, ..catalog::Prices::default() };
    _ = told.usage.map(|usage| prices.of(&usage));
    (all, format!("{:?} {:?} {:?} {}", told.finish, told.usage, told.usd, told.done), wrong)
}
