//! When it goes wrong: the right behaviour, and one clear message.
use super::mock::{Ending, Mock, Script};
use super::{KEY, ask, fields, read, upstream};
use std::time::{Duration, Instant};
use weir_upstream::UpstreamError;

/// What comes of a script: the text, the message, and how often the provider was asked.
async fn outcome(scripts: Vec<Script>) -> (String, Result<(), UpstreamError>, usize) {
    let mock = Mock::start(scripts);
    let (upstream, fields) = (upstream(&mock, ""), fields());
    let started = Instant::now();
    let (text, end) = match upstream.ask(&ask(&fields, "")).await {
        Ok(answer) => read(answer).await,
        Err(error) => (String::new(), Err(error)),
    };
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    (text, end.map(|_| ()), mock.seen().len())
}

async fn check(scripts: Vec<Script>, text: &str, message: Option<&str>, asked: usize) {
    let (got, end, times) = outcome(scripts).await;
    assert_eq!((got.as_str(), times), (text, asked), "{end:?}");
    match (end, message) {
        (Ok(()), None) => {}
        (Err(error), Some(part)) => {
            let error = error.to_string();
            assert!(error.contains(part) && error.contains("mock"), "{error}");
            assert!(!error.contains(KEY), "{error}");
        }
        (end, message) => panic!("{end:?} instead of {message:?}"),
    }
}

#[tokio::test]
async fn a_wrong_key_is_not_tried_again_and_not_shown() {
    let script = Script::error(401, &format!("Incorrect API key provided: {KEY}"));
    let message = "refuses its key (401): Incorrect API key provided: ***; check MOCK_KEY in the environment";
    check(vec![script], "", Some(message), 1).await;
}

#[tokio::test]
async fn refusals_are_passed_on() {
    check(vec![Script::error(400, "too long")], "", Some("refuses the request (400): too long"), 1).await;
    check(vec![Script::error(404, "gone")], "", Some("has no model `m`: gone"), 1).await;
}

#[tokio::test]
async fn retry_after_is_respected() {
    let mut busy = Script::error(429, "slow down");
    busy.headers.push(("retry-after", "1".into()));
    let mock = Mock::start(vec![busy, Script::chat(&["ok"])]);
    let (upstream, fields) = (upstream(&mock, ""), fields());
    for asked in [1, 1] {
        let error = upstream.ask(&ask(&fields, "")).await.unwrap_err();
        assert!(
            matches!(&error, UpstreamError::Busy { after, .. } if *after <= Duration::from_secs(1)),
            "{error}"
        );
        assert_eq!(mock.seen().len(), asked, "it isn't asked before it is time");
    }
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(read(upstream.ask(&ask(&fields, "")).await.unwrap()).await.0, "ok");
}

#[tokio::test]
async fn what_fails_before_the_first_token_is_tried_again() {
    check(vec![Script::error(500, "oops"), Script::chat(&["ok"])], "ok", None, 2).await;
    check(vec![Script::error(500, "oops")], "", Some("failed: status 500: oops"), 3).await;
}

#[tokio::test]
async fn what_may_have_been_read_is_not_sent_again() {
    let message = Some("it may have read the request, so it isn't sent again");
    let gone = Script { dead: true, ending: Ending::Cut, ..Script::error(200, "") };
    check(vec![gone.clone(), Script::chat(&["twice"])], "", message, 1).await;
    let cut = Script::chat(&["never"]).broken_after(0, Ending::Cut);
    check(vec![cut, Script::chat(&["twice"])], "", Some("broke off its answer"), 1).await;
    // Not even where the connection was used before, and is closed without a word.
    let mock = Mock::start(vec![Script::chat(&["ok"]), gone, Script::chat(&["ok"])]);
    let (upstream, fields) = (upstream(&mock, ""), fields());
    assert_eq!(read(upstream.ask(&ask(&fields, "")).await.unwrap()).await.0, "ok");
    let error = upstream.ask(&ask(&fields, "")).await.unwrap_err();
    assert!(matches!(&error, UpstreamError::Cut { .. }), "{error}");
    assert_eq!((mock.connections(), mock.seen().len()), (1, 2), "{error}");
    assert_eq!(read(upstream.ask(&ask(&fields, "")).await.unwrap()).await.0, "ok");
}

#[tokio::test]
async fn a_connection_that_was_closed_while_idle_is_opened_anew() {
    let closed = Script { ending: Ending::Closed, ..Script::chat(&["ok"]) };
    let mock = Mock::start(vec![closed]);
    let (upstream, fields) = (upstream(&mock, ""), fields());
    for times in 1..=3 {
        assert_eq!(read(upstream.ask(&ask(&fields, "")).await.unwrap()).await.0, "ok");
        assert_eq!((mock.connections(), mock.seen().len()), (times, times));
    }
}

#[tokio::test]
async fn a_hang_before_the_first_byte_ends() {
    let dead = Script { dead: true, ..Script::error(200, "") };
    check(vec![dead], "", Some("sent no first token for 0.6 s"), 1).await;
    let hung = Script::chat(&["never"]).broken_after(0, Ending::Hang);
    check(vec![hung], "", Some("sent no first token for 0.6 s"), 1).await;
}

#[tokio::test]
async fn a_stream_cut_in_the_middle_is_not_begun_anew() {
    let cut = Script::chat(&["one ", "two", "three"]).broken_after(2, Ending::Cut);
    check(vec![cut, Script::chat(&["again"])], "one two", Some("broke off its answer"), 1).await;
    let ended = Script::chat(&["one ", "two"]).broken_after(2, Ending::Proper);
    check(vec![ended], "one two", Some("it ended without a reason"), 1).await;
    let hung = Script::chat(&["one ", "two"]).broken_after(2, Ending::Hang);
    check(vec![hung], "one two", Some("sent nothing for 0.3 s"), 1).await;
}

#[tokio::test]
async fn malformed_events_end_the_answer_behind_what_was_good() {
    let mut script = Script::chat(&["good", "never"]);
    script.pieces[1].1 = b"data: {\"choices\": [}\n\n".to_vec();
    check(vec![script], "good", Some("sent what is no answer: an event that is no JSON"), 1).await;
    // Both in one piece.
    let mut script = Script::chat(&["good", "never"]);
    let both =
        [script.pieces[0].1.clone(), b"data: {\"error\":{\"message\":\"melted\"}}\n\n".to_vec()].concat();
    script.pieces[0].1 = both;
    check(vec![script], "good", Some("failed: melted"), 1).await;
}

#[tokio::test]
async fn a_slow_drip_passes_while_events_end_and_not_when_they_do_not() {
    let slow = Script::chat(&["a", "b", "c", "d"]).slow(Duration::from_millis(150));
    check(vec![slow], "abcd", None, 1).await;
    // A byte now and then is no sign of life.
    let mut drip = Script::chat(&["a"]).broken_after(1, Ending::Proper);
    drip.pieces.extend(vec![(Duration::from_millis(50), b"x".to_vec()); 200]);
    check(vec![drip], "a", Some("sent nothing for 0.3 s"), 1).await;
    // Comments are, but not for ever.
    let mut pings = Script::chat(&["a"]).broken_after(1, Ending::Proper);
    pings.pieces.extend(vec![(Duration::from_millis(100), b": ping\n\n".to_vec()); 60]);
    check(vec![pings], "a", Some("sent nothing of its answer for 1."), 1).await;
}

#[tokio::test]
async fn a_huge_line_is_bounded() {
    let mut huge = Script::chat(&["a"]).broken_after(1, Ending::Hang);
    huge.pieces.extend(vec![(Duration::ZERO, vec![b'x'; 64 << 10]); 40]);
    check(vec![huge], "a", Some("an event of more than 1048576 bytes"), 1).await;
}

#[tokio::test]
async fn what_is_no_event_stream_is_said_to_be_none() {
    let page = Script::new(200, "text/html", "<h1>Welcome</h1>");
    check(vec![page], "", Some("it is `text/html`, no event stream: <h1>Welcome</h1>"), 1).await;
}

#[tokio::test]
async fn nobody_there_is_said_in_time() {
    let mock = Mock::start(vec![]);
    let mut entry = upstream(&mock, "").provider().clone();
    entry.url = "http://127.0.0.1:9".into();
    let nobody = weir_upstream::Upstream::new(entry, None, super::TIMES).unwrap();
    let error = nobody.ask(&ask(&fields(), "")).await.unwrap_err().to_string();
    assert!(error.contains("mock failed: 127.0.0.1:9 can't be reached"), "{error}");
}

#[tokio::test]
async fn tries_keep_within_the_latency_budget() {
    let dead = Script { dead: true, ..Script::error(200, "") };
    let mock = Mock::start(vec![Script::error(500, "oops"), dead]);
    let (upstream, fields) = (upstream(&mock, ""), fields());
    let started = Instant::now();
    let mut ask = ask(&fields, "");
    ask.first_by = Some(started + Duration::from_millis(350));
    upstream.ask(&ask).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_millis(550), "{:?}", started.elapsed());
}

#[tokio::test]
async fn whoever_fails_again_and_again_is_left_alone() {
    let mock = Mock::start(vec![Script::error(500, "oops")]);
    let (upstream, fields) = (upstream(&mock, ""), fields());
    for _ in 0..4 {
        upstream.ask(&ask(&fields, "")).await.unwrap_err();
    }
    assert_eq!(mock.seen().len(), 5, "then no more for a while");
    let error = upstream.ask(&ask(&fields, "")).await.unwrap_err();
    assert!(matches!(error, UpstreamError::Busy { .. }), "{error}");
}

#[tokio::test]
async fn debug_output_shows_no_key() {
    let mock = Mock::start(vec![Script::chat(&["a"])]);
    let (upstream, fields) = (upstream(&mock, ""), fields());
    let answer = upstream.ask(&ask(&fields, "")).await.unwrap();
    assert!(!format!("{upstream:?} {answer:?}").contains(KEY));
}
