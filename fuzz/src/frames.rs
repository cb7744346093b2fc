//! Puts frames together from any bytes, in pieces of any size, and reads each: no panic, no overflow, no memory that the
//! bytes don't account for; and what was read can be written and read again.
//!
//! The first byte chooses: 0 takes the rest as it comes off a stream; every other value makes the rest the body of a frame
//! of one kind, whose header is right.
#![no_main]
#![allow(dead_code, unused_imports)] // the source is whole, and not all of it is used here

// Compiled from the source, not through the crate: builds in seconds, and instruments nothing else.
#[path = "../../transport/src/frames/mod.rs"]
pub mod frames;

use bytes::Bytes;
use frames::{Assembler, Frame, HEADER_BYTES, Kind, MAGIC, Message, VERSION};
use weir_scheduler::Event;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else { return };
    match usize::from(*first) % (Kind::ALL.len() + 1) {
        0 => stream(rest),
        n => {
            let mut frame = [&MAGIC[..], &VERSION.to_le_bytes(), &(Kind::ALL[n - 1] as u16).to_le_bytes()].concat();
            frame.extend([0; 4]);
            frame.extend((rest.len() as u32).to_le_bytes());
            frame.extend(rest);
            if let Ok(frame) = Frame::parse(frame.into()) {
                read(&frame);
            }
        }
    }
});

/// Frames off a stream that comes in two pieces.
fn stream(bytes: &[u8]) {
    let Some((cut, bytes)) = bytes.split_first() else { return };
    let (front, back) = bytes.split_at(usize::from(*cut).min(bytes.len()));
    let mut whole = Vec::new();
    let mut assembler = Assembler::default();
    for piece in [front, back] {
        assembler.push(Bytes::copy_from_slice(piece));
        loop {
            match assembler.take() {
                Ok(Some(frame)) => whole.push(frame),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    // The same as in one piece.
    let mut assembler = Assembler::default();
    assembler.push(Bytes::copy_from_slice(bytes));
    for frame in &whole {
        assert_eq!(assembler.take().as_ref(), Ok(&Some(frame.clone())));
        read(frame);
    }
    let consumed: usize = whole.iter().map(|frame| frame.bytes().len()).sum();
    assert!(whole.iter().all(|frame| frame.bytes().len() >= HEADER_BYTES) && consumed <= bytes.len());
}

fn read(frame: &Frame) {
    let Ok(message) = frame.read() else { return };
    let again = match message {
        Message::Hello(hello) => Frame::hello(&hello),
        Message::Welcome(welcome) => Frame::welcome(&welcome),
        Message::Profile(profile) => Frame::profile(&profile),
        Message::Status(status) => Frame::status(status),
        Message::Generate(ask) => match Frame::generate(*ask) {
            Ok(frame) => frame,
            Err(_) => return,
        },
        Message::Cancel { request, attempt } => Frame::cancel(request, attempt),
        Message::Tokens(tokens) => {
            assert_eq!(tokens.ids().count(), tokens.len());
            Frame::tokens(tokens.request(), tokens.attempt(), tokens.iter().collect())
        }
        Message::End { request, attempt, event: Event::Finished { reason, text, usage } } => {
            Frame::finished(request, attempt, reason, text, usage)
        }
        Message::End { request, attempt, event: Event::Failed(failure) } => {
            Frame::failed(request, attempt, failure)
        }
        Message::End { .. } => unreachable!("a token is no end"),
        Message::Order(order) => Frame::order(&order),
        Message::Fetch(fetch) => {
            _ = fetch.text();
            Frame::fetch(&fetch)
        }
        Message::Piece(bytes) => Frame::piece(&bytes),
    };
    assert_eq!(again.kind(), frame.kind());
    if let Err(error) = again.read() {
        panic!("{error} in what was read a moment ago");
    }
}
