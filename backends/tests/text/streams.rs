//! Streams' text against the whole text, on made-up sequences of tokens.
use super::small_tokenizer;
use crate::draw::Draw;
use std::sync::Arc;
use weir_backends::text::{Pushed, TextStream};

/// What a stream must give: the whole text, cut before the stop string that is complete first.
fn naive(whole: &str, stops: &[String]) -> (String, bool) {
    for end in 1..=whole.len() {
        let ending = |stop: &&String| whole.as_bytes()[..end].ends_with(stop.as_bytes());
        if let Some(stop) =
            stops.iter().filter(|stop| !stop.is_empty()).filter(ending).max_by_key(|stop| stop.len())
        {
            return (whole[..end - stop.len()].to_owned(), true);
        }
    }
    (whole.to_owned(), false)
}

fn check(ids: &[u32], stops: &[String]) {
    let tokenizer = Arc::new(small_tokenizer());
    let expected = naive(&tokenizer.decode(ids), stops);
    let mut stream = TextStream::new(tokenizer, stops);
    let mut text = String::new();
    let mut stopped = false;
    for id in ids {
        let pushed = stream.push(*id);
        assert!(!stopped || pushed == Pushed { text: String::new(), stopped: true });
        stopped = pushed.stopped;
        text.push_str(&pushed.text);
        assert!(expected.0.starts_with(&text), "{text:?} was given of {expected:?}; {ids:?}, {stops:?}");
    }
    text.push_str(&stream.finish());
    // an incomplete character at the end may complete a stop string
    assert!(
        text == expected.0 && (stopped == expected.1 || !stopped),
        "{text:?}, not {expected:?}; {ids:?}, {stops:?}"
    );
    assert_eq!(stream.finish(), "");
}

#[test]
fn characters_are_never_split() {
    let bytes = |text: &[u8]| text.iter().map(|byte| u32::from(*byte)).collect::<Vec<u32>>();
    check(&bytes("aé漢🙂".as_bytes()), &[]);
    check(&bytes(b"\xf0\x9f\x99"), &[]);
    check(&bytes(b"\xf0\x9fx\xff\xe6\xe6\xbc\xa2\xc0\xaf\xed\xa0\x80"), &[]);
    check(&bytes(b"ab\xe6"), &["b\u{fffd}".into()]);
}

#[test]
fn the_beginning_of_a_stop_string_is_held_back() {
    let tokenizer = Arc::new(small_tokenizer());
    let mut stream = TextStream::new(Arc::clone(&tokenizer), &["END".into(), "".into(), "\n\nUser".into()]);
    let mut push = |text: &str| stream.push(tokenizer.id(text).unwrap());
    let given = |text: &str| Pushed { text: text.into(), stopped: false };
    assert_eq!(push("abc"), given("abc"));
    assert_eq!(push("<0x0A>"), given(""));
    assert_eq!(push("<0x45>"), given("\n"));
    assert_eq!(push("END"), Pushed { text: "E".into(), stopped: true });
    assert_eq!(stream.finish(), "");
}

#[test]
fn streams_equal_the_whole_text() {
    for seed in 0..3000 {
        let mut random = Draw::new(seed);
        let alphabet = [b'a', b'b', b'c', 0xc3, 0xa9, 0xe6, 0xbc, 0xa2, b'E', b'N', b'D', b'\n'];
        let ids: Vec<u32> = (0..random.below(24))
            .map(|_| {
                if random.below(3) == 0 {
                    256 + random.below(9)
                } else {
                    alphabet[random.below(12) as usize].into()
                }
            })
            .collect();
        let parts = ["a", "b", "ab", "é", "END", "\n", "漢", "\u{fffd}", "c", "aa"];
        let stops: Vec<String> = (0..random.below(4))
            .map(|_| (0..random.below(4)).map(|_| parts[random.below(10) as usize]).collect())
            .collect();
        eprintln!("seed {seed}");
        check(&ids, &stops);
    }
}

#[test]
fn long_stop_strings_take_linear_time() {
    let stop = "a".repeat(1 << 18) + "b";
    let mut stream = TextStream::new(Arc::new(small_tokenizer()), &[stop]);
    let given: usize = (0..1 << 19).map(|_| stream.push(u32::from(b'a')).text.len()).sum();
    assert_eq!(given, 1 << 18);
    assert_eq!(stream.finish().len(), 1 << 18);
}
