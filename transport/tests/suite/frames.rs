//! Frames.
use crate::samples::{self, Rng};
use weir_scheduler::{
    BlockKey, CacheStatus, Event, Finish, LABEL_BYTES_MAX, LABELS_MAX, ModelId, PREFIXES_MAX, RequestId,
    Status, TextId, ToNode,
};
use weir_transport::{
    BODY_MAX, Frame, FrameError, HEADER_BYTES, Hello, Kind, Message, Order, PIECE_MAX, RefusalCode, VERSION,
    Welcome,
};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/frames.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Version 1 is frozen: nodes and schedulers of different ages meet. What changes these bytes needs a new version beside
/// the old one, or an extension; only lines for new kinds and extensions may be added, with
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
        assert_eq!(new, old, "the wire format of version {VERSION} changed");
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
            Message::Hello(hello) => assert_eq!(hello, samples::hello()),
            Message::Welcome(welcome) => assert_eq!(welcome, samples::welcome()),
            Message::Profile(profile) => assert_eq!(profile, samples::profile()),
            Message::Status(status) if name == "caches" => assert_eq!(status, samples::caches()),
            Message::Status(status) if name == "others" => assert_eq!(status, samples::others()),
            Message::Status(status) => assert_eq!(status, samples::status()),
            Message::Generate(ask) if name == "grammar" => assert_eq!(*ask, samples::ask_with_grammar()),
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
            Message::Order(order) => assert_eq!(order, Order::Drain { on: true }),
            Message::Fetch(fetch) => assert_eq!(fetch.text(), Some(TextId([3; 32]))),
            Message::Piece(bytes) => assert_eq!(bytes, b"some of it".as_slice()),
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
            // A piece is whatever it is.
            assert!(!survive(bytes) || name == "piece", "{name}, cut to {cut} bytes, is read");
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
    check(4, &[2, 0], FrameError::Version(2));
    check(4, &[1, 0x80], FrameError::Version(0x8001));
    assert!(FrameError::Version(99).to_string().contains("version 99,"), "{}", FrameError::Version(99));
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

/// `frame` with another body, of a true length.
fn with_body(frame: Frame, body: &str) -> Frame {
    let mut bytes = frame.bytes()[..HEADER_BYTES].to_vec();
    bytes[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend(body.as_bytes());
    Frame::parse(bytes.into()).unwrap()
}

#[test]
fn what_describes_itself_may_grow() {
    let hello = with_body(
        Frame::hello(&Hello::default()),
        r#"{"versions":[99],"software":"9.9","name":"n","mood":"good"}"#,
    );
    let Message::Hello(read) = hello.read().unwrap() else { panic!() };
    assert_eq!((read.versions, read.proof), (vec![99], None));
    let welcome =
        r#"{"version":99,"node":1,"heartbeat_ms":1,"refused":{"code":"weekday","message":"closed"}}"#;
    let welcome = with_body(Frame::welcome(&Welcome::default()), welcome);
    let Message::Welcome(read) = welcome.read().unwrap() else { panic!() };
    assert_eq!(read.refused.unwrap().code, RefusalCode::Other);
    let order = with_body(Frame::order(&Order::Drain { on: true }), r#"{"order":"dance","with":[1]}"#);
    assert!(matches!(order.read(), Ok(Message::Order(Order::Other))));
}

#[test]
fn a_greeting_of_any_version_can_be_read() {
    for version in [0u16, 99] {
        let mut bytes = Frame::hello(&samples::hello()).bytes().to_vec();
        bytes[4..6].copy_from_slice(&version.to_le_bytes());
        let frame = Frame::parse(bytes.into()).unwrap();
        assert!(matches!(frame.read(), Ok(Message::Hello(_))));
    }
}

#[test]
fn profiles_and_orders_may_say_more() {
    let full = samples::full_profile();
    let frame = Frame::profile(&full);
    assert!(matches!(frame.read(), Ok(Message::Profile(profile)) if profile == full));
    let model = ModelId([3; 32]);
    for told in [ToNode::Load { number: 8, model, bytes: 500 }, ToNode::Unload { number: 9, model }] {
        let order = Order::of(&told).unwrap();
        assert_eq!(order.model(), Some(model));
        assert!(matches!(Frame::order(&order).read(), Ok(Message::Order(read)) if read == order));
    }
    assert_eq!(Order::of(&ToNode::Cancel { request: RequestId(1), attempt: 0 }), None);
}

#[test]
fn senseless_profiles_are_refused() {
    let check = |spoil: fn(&mut weir_scheduler::Profile)| {
        let mut profile = samples::profile();
        spoil(&mut profile);
        let error = Frame::profile(&profile).read().unwrap_err();
        assert!(matches!(error, FrameError::Senseless { kind: Kind::Profile, .. }), "{error}");
    };
    check(|p| p.models[0].slots = 0);
    check(|p| p.models[0].name.clear());
    check(|p| p.models[0].rates.prefill_tokens_per_s = -1.0);
    check(|p| p.models[0].prefixes = vec![BlockKey([0; 16]); PREFIXES_MAX + 1]);
    check(|p| p.labels = vec![("x".into(), String::new()); LABELS_MAX + 1]);
    check(|p| p.labels = vec![("x".into(), "y".repeat(LABEL_BYTES_MAX + 1))]);
    check(|p| p.labels = vec![(String::new(), "y".into())]);
    check(|p| p.failures = vec![(ModelId([1; 32]), String::new()); 1025]);
    let short = Frame::profile(&samples::profile()).bytes()[HEADER_BYTES..].to_vec();
    let short = String::from_utf8(short).unwrap().replace(&"01".repeat(32), "01");
    let frame = with_body(Frame::profile(&samples::profile()), &short);
    assert!(matches!(frame.read(), Err(FrameError::Senseless { .. })), "{short}");
}

#[test]
fn kinds_have_bounds_of_their_own() {
    for (name, frame) in samples::all() {
        let mut bytes = frame.bytes().to_vec();
        bytes[12..16].copy_from_slice(&(BODY_MAX as u32 + 1).to_le_bytes());
        assert!(matches!(Frame::parse(bytes.clone().into()), Err(FrameError::TooLong(_))), "{name}");
        bytes[12..16].copy_from_slice(&(PIECE_MAX as u32 + 1).to_le_bytes());
        let small = matches!(
            frame.kind(),
            Kind::Hello | Kind::Welcome | Kind::Profile | Kind::Order | Kind::Fetch | Kind::Piece
        );
        let refused = matches!(Frame::parse(bytes.into()), Err(FrameError::TooLong(_)));
        assert_eq!(refused, small, "{name}");
    }
}

/// What a heartbeat says of caches is an extension of version 1: whoever doesn't know it reads the rest.
#[test]
fn a_heartbeat_tells_of_caches() {
    let key = |n: u8| BlockKey([n; 16]);
    let cache = |new: Vec<BlockKey>, gone: Vec<BlockKey>| CacheStatus { model: ModelId([1; 32]), new, gone };
    let check = |caches: Vec<CacheStatus>, reads: bool| {
        let status = Status { caches, ..samples::status() };
        let frame = Frame::parse(Frame::status(status.clone()).bytes().clone()).unwrap();
        match frame.read() {
            Ok(Message::Status(read)) => assert!(reads && read == status, "{read:?}"),
            other => assert!(!reads, "{other:?}"),
        }
    };
    check(vec![cache(vec![key(1), key(2)], vec![key(3)]), cache(vec![], vec![])], true);
    check(vec![cache(vec![key(1); PREFIXES_MAX], vec![])], true);
    check(vec![cache(vec![key(1); PREFIXES_MAX], vec![key(2)])], false);
}
