//! Frames.
use crate::samples::{self, Rng};
use weir_scheduler::{Event, Finish, RequestId};
use weir_transport::{BODY_MAX, Frame, FrameError, HEADER_BYTES, Kind, Message, VERSION};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/frames.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes of the provisional version. To make the file anew after a change that is meant:
/// `UPDATE_GOLDEN=1 cargo test -p weir-transport golden`.
#[test]
fn golden_bytes_stay() {
    let now: String =
        samples::all().iter().map(|(name, frame)| format!("{name} {}\n", hex(frame.bytes()))).collect();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(GOLDEN, &now).unwrap();
    }
    let golden = std::fs::read_to_string(GOLDEN).unwrap();
    for (new, old) in now.lines().zip(golden.lines()) {
        assert_eq!(new, old, "the wire format of version {VERSION:#x} changed");
    }
    assert_eq!(now.lines().count(), golden.lines().count());
}

#[test]
fn what_arrives_is_what_was_sent() {
    let parsed = |frame: &Frame| Frame::parse(frame.bytes().clone()).unwrap();
    for (name, frame) in samples::all() {
        let frame = parsed(&frame);
        let id = RequestId(7);
        match frame.read().unwrap() {
            Message::Hello(hello) => assert_eq!(hello.name, "küche"),
            Message::Welcome(welcome) => assert_eq!(welcome.node, 5),
            Message::Profile(profile) => assert_eq!(profile, samples::profile()),
            Message::Status(status) => assert_eq!(status, samples::status()),
            Message::Generate(ask) => assert_eq!(*ask, samples::ask()),
            Message::Cancel { request, attempt } => assert_eq!((request, attempt), (id, 1)),
            Message::Tokens(tokens) => {
                assert_eq!((tokens.request(), tokens.attempt(), tokens.len()), (id, 1, 2));
                assert_eq!(tokens.iter().collect::<Vec<_>>(), samples::tokens());
                assert_eq!(tokens.ids().collect::<Vec<_>>(), [9, 10]);
            }
            Message::End { request, attempt, event } => {
                assert_eq!((request, attempt), (id, 1));
                match event {
                    Event::Finished { reason, text, usage } => {
                        assert_eq!((reason, text.as_str(), usage.output_tokens), (Finish::Length, "…", 4));
                    }
                    Event::Failed(failure) => assert_eq!(failure.message, "no room"),
                    Event::Token(_) => panic!("{name}"),
                }
            }
        }
    }
}

/// Refused or read: never a panic. Whatever is read can be gone through.
fn survive(bytes: Vec<u8>) -> bool {
    let Ok(frame) = Frame::parse(bytes.into()) else { return false };
    match frame.read() {
        Ok(Message::Tokens(tokens)) => tokens.iter().count() == tokens.len(),
        other => other.is_ok(),
    }
}

#[test]
fn damaged_frames_are_refused_without_a_panic() {
    for seed in 0..20_000 {
        let mut rng = Rng(seed);
        let frames = samples::all();
        let frame = &frames[rng.below(frames.len() as u64) as usize].1;
        let mut bytes = frame.bytes().to_vec();
        let outcome = std::panic::catch_unwind(move || {
            match rng.below(3) {
                0 => bytes.truncate(rng.below(bytes.len() as u64) as usize),
                1 => {
                    for _ in 0..=rng.below(4) {
                        let bit = rng.below(8 * bytes.len() as u64);
                        bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
                    }
                }
                _ => bytes[HEADER_BYTES..].iter_mut().for_each(|b| *b = rng.below(256) as u8),
            }
            survive(bytes)
        });
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

#[test]
fn truncated_bodies_with_true_lengths_are_refused() {
    for (name, frame) in samples::all() {
        for cut in HEADER_BYTES..frame.bytes().len() {
            let mut bytes = frame.bytes()[..cut].to_vec();
            bytes[12..16].copy_from_slice(&((cut - HEADER_BYTES) as u32).to_le_bytes());
            assert!(!survive(bytes), "{name}, cut to {cut} bytes, is read");
        }
    }
}

#[test]
fn foreign_frames_are_refused_by_name() {
    let check = |at: usize, with: &[u8], error: FrameError| {
        let mut bytes = Frame::cancel(RequestId(1), 0).bytes().to_vec();
        bytes[at..at + with.len()].copy_from_slice(with);
        assert_eq!(Frame::parse(bytes.into()).unwrap_err(), error);
    };
    check(0, b"HTTP", FrameError::Magic);
    check(4, &[0, 0], FrameError::Version(0));
    check(4, &[99, 0], FrameError::Version(99));
    check(6, &[77, 0], FrameError::Kind(77));
    check(8, &[1], FrameError::Flags(1));
    let long = BODY_MAX + 1;
    check(12, &(long as u32).to_le_bytes(), FrameError::TooLong(long));
    check(12, &[1, 0, 0, 0], FrameError::Length { got: 28, want: 17 });
    assert_eq!(Frame::parse(vec![1, 2].into()).unwrap_err(), FrameError::Length { got: 2, want: 16 });
}

#[test]
fn senseless_requests_are_refused() {
    let check = |why: &str, spoil: fn(&mut weir_scheduler::Generate)| {
        let mut ask = samples::ask();
        spoil(&mut ask);
        let frame = Frame::generate(ask).unwrap();
        let error = frame.read().unwrap_err();
        assert!(matches!(error, FrameError::Senseless { kind: Kind::Generate, .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    check("prompt", |ask| ask.prompt.clear());
    check("max_tokens", |ask| ask.max_tokens = 0);
    check("stop", |ask| ask.stop.push(String::new()));
    check("sampling", |ask| ask.sampling.temperature = f32::NAN);
    check("sampling", |ask| ask.sampling.top_p = 0.0);
    check("sampling", |ask| ask.sampling.logprobs = Some(21));
    check("sampling", |ask| ask.sampling.logit_bias.push((1, f32::INFINITY)));
    let mut ask = samples::ask();
    ask.prompt = vec![0; BODY_MAX / 4];
    assert!(matches!(Frame::generate(ask), Err(FrameError::TooLong(_))));
}
