//! Tokenizers of made-up vocabularies: rules that the test models don't exercise, and damaged files.
use super::{small_tokenizer, vocabulary_file};
use crate::draw::Draw;
use weir_backends::gguf::{Strings, Value};
use weir_backends::text::{Special, TextError, Tokenizer};

fn strings(texts: &[&str]) -> Value {
    texts.iter().collect::<Strings>().into()
}

/// A byte-level vocabulary of `tokens`, then `<|x|>` as a control and `<y>` as a user-defined token.
fn byte_level(pre: &str, tokens: &[&str], merges: &[&str]) -> Tokenizer {
    let kinds: Vec<i32> = tokens.iter().map(|_| 1).chain([3, 4]).collect();
    let tokens: Vec<&str> = tokens.iter().copied().chain(["<|x|>", "<y>"]).collect();
    let file = vocabulary_file(&[
        ("model", "gpt2".into()),
        ("pre", pre.into()),
        ("tokens", strings(&tokens)),
        ("token_type", kinds.into()),
        ("merges", strings(merges)),
    ]);
    Tokenizer::from_gguf(&file).unwrap()
}

fn check(tokenizer: &Tokenizer, text: &str, special: Special, names: &[&str]) {
    let ids = tokenizer.encode(text, special);
    assert_eq!(ids.iter().map(|id| tokenizer.name(*id)).collect::<Vec<_>>(), names, "{text:?}");
}

#[test]
fn merges_go_by_rank() {
    let tokenizer =
        byte_level("gpt-2", &["a", "b", "c", "Ġ", "ab", "bc", "abc", "Ġa"], &["b c", "a b", "a bc", "Ġ a"]);
    check(&tokenizer, "abc ab a", Special::Parse, &["abc", "Ġ", "ab", "Ġa"]);
    let tokenizer =
        byte_level("gpt-2", &["a", "b", "c", "Ġ", "ab", "bc", "abc", "Ġa"], &["a b", "b c", "a bc", "Ġ a"]);
    check(&tokenizer, "abc", Special::Parse, &["ab", "c"]);
}

#[test]
fn whole_words_beat_merges_in_llama_3() {
    let tokens = ["a", "b", "c", "ab", "abc"];
    check(&byte_level("llama-bpe", &tokens, &["a b"]), "abc", Special::Parse, &["abc"]);
    check(&byte_level("gpt-2", &tokens, &["a b"]), "abc", Special::Parse, &["ab", "c"]);
}

#[test]
fn merges_into_what_is_no_token() {
    let tokenizer = byte_level("gpt-2", &["a", "b", "c", "abc"], &["a b", "ab c", "b b"]);
    check(&tokenizer, "abc", Special::Parse, &["abc"]);
    check(&tokenizer, "abbb", Special::Parse, &["a", "b", "b", "b"]);
    check(&tokenizer, "é\u{0}", Special::Parse, &[]);
}

#[test]
fn added_tokens() {
    let tokenizer = byte_level("gpt-2", &["<", "|", "x", ">", "y", "a"], &[]);
    check(&tokenizer, "a<|x|><y>", Special::Parse, &["a", "<|x|>", "<y>"]);
    check(&tokenizer, "a<|x|><y>", Special::AsText, &["a", "<", "|", "x", "|", ">", "<y>"]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("a<|x|><y>", Special::Parse)), "a<y>");
}

/// Longest first, then from left to right: token by token, over what is left.
#[test]
fn added_tokens_are_found_as_one_by_one() {
    let names = ["aab", "aa", "ab", "b", "bba", "a\n", "\n\n", "\n\n\n", "\n\n\n\n"];
    let tokens: Vec<&str> = ["<0x61>"].into_iter().chain(names).collect();
    let kinds: Vec<i32> = [6].into_iter().chain(names.map(|_| 4)).collect();
    let tokenizer = Tokenizer::from_gguf(&vocabulary_file(&[
        ("model", "llama".into()),
        ("tokens", strings(&tokens)),
        ("token_type", kinds.into()),
        ("add_space_prefix", false.into()),
    ]))
    .unwrap();
    let mut by_length = names;
    by_length.sort_by_key(|name| std::cmp::Reverse(name.len()));
    for seed in 0..2000 {
        let mut random = Draw::new(seed);
        let text: String =
            (0..random.below(20)).map(|_| ['a', 'a', 'b', '\n'][random.below(4) as usize]).collect();
        let found: Vec<(bool, String)> = naive(&text, &by_length);
        let expected: Vec<String> =
            found.into_iter().filter(|(token, _)| *token).map(|(_, text)| text).collect();
        let ids = tokenizer.encode(&text, Special::Parse);
        let names: Vec<&str> =
            ids.iter().map(|id| tokenizer.name(*id)).filter(|name| names.contains(name)).collect();
        assert_eq!(names, expected, "seed {seed}: {text:?}");
    }
}

/// The parts of `text`, and whether each is an added token.
fn naive(text: &str, names: &[&str]) -> Vec<(bool, String)> {
    let mut parts = vec![(false, text.to_owned())];
    // tokens of one length are looked for together, so that the leftmost goes first
    for length in (1..=4).rev() {
        let names: Vec<&str> = names.iter().copied().filter(|name| name.len() == length).collect();
        parts = parts
            .into_iter()
            .flat_map(|(token, text)| if token { vec![(token, text)] } else { cut(&text, &names) })
            .collect();
    }
    parts
}

fn cut(mut text: &str, names: &[&str]) -> Vec<(bool, String)> {
    let mut parts = Vec::new();
    while let Some((at, name)) = names.iter().filter_map(|name| text.find(name).map(|at| (at, name))).min() {
        parts.push((false, text[..at].to_owned()));
        parts.push((true, (*name).to_owned()));
        text = &text[at + name.len()..];
    }
    parts.push((false, text.to_owned()));
    parts
}

#[test]
fn sentencepiece_merges_go_by_score() {
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "ba", "<0xC3>"];
    let scores = vec![0.0f32, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0];
    let kinds = vec![2i32, 3, 3, 1, 1, 1, 1, 1, 1, 6];
    let file = |prefix: bool| {
        vocabulary_file(&[
            ("model", "llama".into()),
            ("tokens", strings(&tokens)),
            ("scores", scores.clone().into()),
            ("token_type", kinds.clone().into()),
            ("add_space_prefix", prefix.into()),
        ])
    };
    let tokenizer = Tokenizer::from_gguf(&file(true)).unwrap();
    check(&tokenizer, "ab<s>b a", Special::Parse, &["▁a", "b", "<s>", "▁", "b", "▁a"]);
    check(&tokenizer, "é", Special::Parse, &["▁", "<0xC3>", "<unk>"]);
    assert!(tokenizer.encode("", Special::Parse).is_empty());
    let tokenizer = Tokenizer::from_gguf(&file(false)).unwrap();
    check(&tokenizer, "abab", Special::Parse, &["ab", "ab"]);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(1), Some(2), true));
    let ids = |text| tokenizer.encode_prompt(text, Special::Parse);
    assert_eq!((ids("a"), ids("<s>a"), ids("")), (vec![1, 4], vec![1, 4], vec![1]));
}

#[test]
fn ids_out_of_range_have_no_text() {
    let tokenizer = small_tokenizer();
    for id in [tokenizer.len() as u32, u32::MAX] {
        assert!(tokenizer.bytes(id).is_empty() && tokenizer.name(id).is_empty() && !tokenizer.is_end(id));
    }
}

#[test]
fn damaged_vocabularies_are_refused() {
    let error = |pairs: &[(&str, Value)]| Tokenizer::from_gguf(&vocabulary_file(pairs)).unwrap_err();
    let tokens = || ("tokens", strings(&["a", "b"]));
    assert!(matches!(error(&[]), TextError::Missing { .. }));
    assert!(matches!(error(&[("model", 1u32.into())]), TextError::Missing { .. }));
    assert_eq!(error(&[("model", "t5".into())]), TextError::UnknownModel("t5".into()));
    let pre = [("model", "gpt2".into()), ("pre", "new".into()), tokens()];
    assert_eq!(error(&pre), TextError::UnknownPreTokenizer("new".into()));
    assert!(matches!(error(&[("model", "gpt2".into()), tokens()]), TextError::Missing { .. }));
    let llama = |more: (&'static str, Value)| error(&[("model", "llama".into()), tokens(), more]);
    assert!(matches!(llama(("scores", vec![0.0f32].into())), TextError::BadVocabulary(_)));
    assert!(matches!(llama(("scores", "x".into())), TextError::Missing { .. }));
    assert!(matches!(llama(("token_type", vec![1i32].into())), TextError::BadVocabulary(_)));
    let long = "x".repeat(2000);
    assert!(matches!(
        error(&[("model", "llama".into()), ("tokens", strings(&[&long]))]),
        TextError::BadVocabulary(_)
    ));
    assert!(matches!(
        error(&[("model", "llama".into()), ("tokens", strings(&[]))]),
        TextError::BadVocabulary(_)
    ));
}

#[test]
fn strange_vocabularies_are_bounded() {
    // texts twice, empty ones, ids out of range, scores that aren't numbers, merges that aren't any
    let tokens = ["a", "a", "", "<0xZZ>", "aa", "b"];
    for model in ["gpt2", "llama"] {
        let file = vocabulary_file(&[
            ("model", model.into()),
            ("tokens", strings(&tokens)),
            ("token_type", vec![4i32, 3, 4, 6, -7, 1].into()),
            ("scores", vec![f32::NAN, f32::INFINITY, -0.0, f32::NAN, f32::NAN, 0.0].into()),
            ("merges", strings(&["", " ", "a", "a ", " a", "a a", "a a", "é é"])),
            ("bos_token_id", 99u32.into()),
            ("eos_token_id", (-1i32).into()),
        ]);
        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        for text in ["", "a", "aaaa", "ab é <0xZZ>", " a a "] {
            tokenizer.decode(&tokenizer.encode(text, Special::Parse));
            tokenizer.encode_prompt(text, Special::AsText);
        }
    }
}
