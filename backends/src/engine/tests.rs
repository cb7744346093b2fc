//! The engine on the null device: whatever else happens, a stream is what it would be alone.
mod draft;

use super::schedule::STALL_MAX;
use super::*;
use crate::null::{NULL_MODEL, Null};
use crate::program::{Batch, Program};
use std::collections::HashMap;
use tokio::sync::mpsc::{Receiver, channel, error::TryRecvError};
use weir_scheduler::{KvType, Priority, Usage};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

fn ask(request: u64, prompt: Vec<u32>, max_tokens: u32) -> Generate {
    Generate { request: RequestId(request), ..Generate::new(NULL_MODEL, prompt, max_tokens) }
}

fn config(blocks: u32, slots: u32, rows: u32) -> EngineConfig {
    let layout = KvLayout { blocks, kv: KvType::F16, slots, rows };
    let speculation = Speculation::Off;
    EngineConfig { model: NULL_MODEL, layout, context: u32::MAX, prefill_chunk: rows, speculation }
}

fn engine(null: &Null, config: EngineConfig) -> Engine {
    Engine::new(null.virtual_program(config.layout).0, null.vocabulary(), config)
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
struct Stream {
    ids: Vec<u32>,
    /// One a token.
    texts: Vec<String>,
    end: Option<(Finish, String, Usage)>,
    failed: Option<FailureKind>,
}

impl Stream {
    fn add(&mut self, event: Event, first: usize) {
        assert!(!self.over(), "{event:?} after the end");
        match event {
            Event::Token(token) => {
                assert_eq!(token.position as usize, first + self.ids.len(), "positions are contiguous");
                self.ids.push(token.id);
                self.texts.push(token.text);
            }
            Event::Finished { reason, text, usage } => self.end = Some((reason, text, usage)),
            Event::Failed(failure) => self.failed = Some(failure.kind),
        }
    }

    fn over(&self) -> bool {
        self.end.is_some() || self.failed.is_some()
    }
}

/// The stream of a request that has an engine for itself.
fn alone(null: &Null, context: u32, ask: &Generate) -> Stream {
    let mut config = config(64, 1, 4096);
    config.context = context;
    let mut engine = engine(null, config);
    let (sink, mut events) = channel(8192);
    let ask = Generate { output: Vec::new(), deadline: None, ..ask.clone() };
    engine.generate(Time::ZERO, ask, sink).unwrap();
    while engine.step(Time::ZERO) != Progress::Idle {}
    let mut stream = Stream::default();
    while let Ok(event) = events.try_recv() {
        stream.add(event, 0);
    }
    stream
}

fn random_ask(random: &mut Random, request: u64, context: u32) -> Generate {
    // Few beginnings, so that many share blocks.
    let family = random.below(3) as u32;
    let length = 1 + random.below((context as usize - 2).min(200));
    let shared = random.below(length + 1);
    let own = request as u32;
    let prompt =
        (0..length as u32).map(|i| 1 + (i * 7 + family * 13 + u32::from(i as usize > shared) * own) % 90);
    let mut ask = ask(request, prompt.collect(), 1 + random.below(80) as u32);
    ask.priority = [Priority::Background, Priority::Normal, Priority::Interactive][random.below(3)];
    ask.salt = random.below(2) as u64;
    ask.ignore_eos = random.one_in(5);
    ask.sampling.seed = random.next();
    ask.sampling.temperature = [0.0, 1.0][random.below(2)];
    ask.sampling.presence_penalty = [0.0, 0.0, 1.0][random.below(3)];
    ask.sampling.repetition_penalty = [1.0, 1.0, 1.5][random.below(3)];
    ask.sampling.logprobs = [None, Some(2)][random.below(2)];
    if random.one_in(3) {
        ask.stop = vec!["t7".into(), " t1 t2".into(), "9 t1".into()];
    }
    ask
}

/// One request under test, and its reader.
struct Client {
    ask: Generate,
    expected: Stream,
    events: Option<Receiver<Event>>,
    seen: Stream,
    capacity: usize,
    asleep: usize,
    cancelled: bool,
}

impl Client {
    fn read(&mut self, random: &mut Random) {
        if self.asleep > 0 {
            self.asleep -= 1;
            return;
        }
        if random.one_in(30) {
            self.asleep = random.below(60);
        }
        let Some(events) = &mut self.events else { return };
        for _ in 0..1 + random.below(self.capacity) {
            match events.try_recv() {
                Ok(event) => self.seen.add(event, self.ask.output.len()),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    assert!(self.seen.over(), "a stream without an end");
                    self.events = None;
                    break;
                }
            }
        }
    }

    /// What was seen is the stream of the request alone, or its beginning if it was cancelled.
    fn check(&self, context: &str) {
        let from = self.ask.output.len();
        let (seen, expected) = (&self.seen, &self.expected);
        assert!(expected.ids[from..].starts_with(&seen.ids), "{context}: {:?}", self.ask);
        assert!(expected.texts[from..].starts_with(&seen.texts), "{context}: {:?}", self.ask);
        if seen.failed.is_some() {
            assert!(self.cancelled && seen.failed == Some(FailureKind::Cancelled), "{context}: {seen:?}");
        } else if !self.cancelled || seen.end.is_some() {
            let (reason, text, usage) = seen.end.as_ref().expect("an end");
            let (expected_reason, expected_text, expected_usage) = expected.end.as_ref().unwrap();
            assert_eq!((reason, text), (expected_reason, expected_text), "{context}: {:?}", self.ask);
            assert_eq!(usage.output_tokens, expected_usage.output_tokens, "{context}");
            assert_eq!(usage.prompt_tokens as usize, self.ask.prompt.len(), "{context}");
            assert!((usage.cached_tokens as usize) < self.ask.prompt.len() + from, "{context}");
        }
    }
}

/// A schedule drawn from a seed: sizes, requests, cancellations, resumptions and readers that fall asleep.
fn check_schedule(seed: u64) {
    let random = &mut Random(seed);
    let slots = 1 + random.below(6) as u32;
    let mut config = config(3 + random.below(30) as u32, slots, slots + random.below(64) as u32);
    config.prefill_chunk = 1 + random.below(64) as u32;
    config.speculation =
        [Speculation::Off, Speculation::Auto, Speculation::Always(2), Speculation::Always(15)]
            [random.below(4)];
    let config = config.bounded();
    let (depth, repeats) = (1 + random.below(3), random.one_in(2));
    let null = Null { vocab: 100, end_one_in: 60, depth, repeats, ..Null::default() };
    let mut engine = engine(&null, config);
    if let Some(ill) =
        [None, Some(draft::Ill::Wrong(2)), Some(draft::Ill::Wrong(7)), Some(draft::Ill::Lost(40))]
            [random.below(4)]
    {
        engine = engine.with_draft(draft::draft(&null, config, ill));
    }
    let mut clients: Vec<Client> = Vec::new();
    let (requests, mut now, mut turns) = (20 + random.below(20), Time::ZERO, 0);
    while clients.len() < requests || clients.iter().any(|c| c.events.is_some()) {
        if clients.len() < requests && random.one_in(6) {
            let mut ask = random_ask(random, clients.len() as u64, config.context);
            let expected = alone(&null, config.context, &ask);
            if random.one_in(4) {
                ask.output = expected.ids[..random.below(expected.ids.len() + 1)].to_vec();
            }
            let capacity = 1 + random.below(8);
            let (sink, events) = channel(capacity);
            engine.generate(now, ask.clone(), sink).unwrap();
            let (events, seen) = (Some(events), Stream::default());
            clients.push(Client { ask, expected, events, seen, capacity, asleep: 0, cancelled: false });
        }
        if random.one_in(40) && !clients.is_empty() {
            let at = random.below(clients.len());
            clients[at].cancelled |= clients[at].events.is_some() && !clients[at].seen.over();
            if random.one_in(2) {
                engine.cancel(clients[at].ask.request, 0);
            } else if clients[at].cancelled {
                clients[at].events = None;
            }
        }
        now = now + Duration::from_millis(random.below(20) as u64);
        engine.step(now);
        engine.check();
        clients.iter_mut().for_each(|client| client.read(random));
        turns += 1;
        assert!(turns < 200_000, "seed {seed}: no end, {:?}", engine.status(now));
    }
    clients.iter().for_each(|client| client.check(&format!("seed {seed}")));
    while engine.step(now) != Progress::Idle {}
    let status = engine.status(now);
    assert_eq!(
        status.kv_blocks_free + status.kv_blocks_cached,
        status.kv_blocks_total,
        "seed {seed}: a block leaked"
    );
    assert_eq!((status.running, status.queued), (0, 0), "seed {seed}");
    assert_eq!(engine.ended, requests as u64, "seed {seed}");
}

#[test]
fn random_schedules_change_no_stream() {
    let first = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in first.map_or(0..300, |seed: u64| seed..seed + 1) {
        check_schedule(seed);
    }
}

/// Runs requests that all begin at once, with readers that keep up.
fn run(engine: &mut Engine, asks: Vec<Generate>) -> Vec<Stream> {
    let mut clients = Vec::new();
    for ask in asks {
        let (sink, events) = channel(4096);
        let first = ask.output.len();
        engine.generate(Time::ZERO, ask, sink).unwrap();
        clients.push((first, events, Stream::default()));
    }
    while engine.step(Time::ZERO) != Progress::Idle {
        engine.check();
    }
    for (first, events, stream) in &mut clients {
        while let Ok(event) = events.try_recv() {
            stream.add(event, *first);
        }
    }
    clients.into_iter().map(|(_, _, stream)| stream).collect()
}

#[test]
fn guesses_save_steps_and_change_nothing() {
    let check = |speculation: Speculation, repeats: bool, depth: usize| {
        let null = Null { vocab: 20, repeats, depth, ..Null::default() };
        let mut engine = engine(&null, EngineConfig { speculation, ..config(64, 3, 64) });
        let asks: Vec<Generate> = (0..3).map(|i| ask(i, vec![1 + i as u32; 5], 400)).collect();
        let expected: Vec<_> = asks.iter().map(|ask| alone(&null, 1000, ask).ids).collect();
        let found = run(&mut engine, asks);
        assert!(found.iter().map(|stream| &stream.ids).eq(&expected), "{speculation:?}");
        engine.status(Time::ZERO)
    };
    for depth in [1, 3] {
        let plain = check(Speculation::Off, true, depth);
        assert_eq!((plain.guessed, plain.tokens_generated), (0, 1200));
        let guessing = check(Speculation::Always(7), true, depth);
        assert!(guessing.guessed_right > 800 && guessing.steps * 4 < plain.steps * 3, "{guessing:?}");
        assert_eq!(guessing.tokens_generated, 1200);
        let auto = check(Speculation::Auto, true, depth);
        assert!(auto.guessed_right > 700 && auto.steps * 4 < plain.steps * 3, "{auto:?}");
        let vain = check(Speculation::Auto, false, depth);
        assert!(vain.guessed < 60, "nothing to be guessed: {vain:?}");
    }
}

#[test]
fn a_beginning_is_computed_once() {
    let null = Null::default();
    let mut engine = engine(&null, config(32, 4, 64));
    let prompt: Vec<u32> = (1..=100).collect();
    let check = |engine: &mut Engine, prompt: &[u32], salt: u64, cached: u32| {
        let stream = &run(engine, vec![Generate { salt, ..ask(0, prompt.to_vec(), 40) }])[0];
        assert_eq!(stream.end.as_ref().unwrap().2.cached_tokens, cached);
        stream.ids.clone()
    };
    let ids = check(&mut engine, &prompt, 0, 0);
    assert_eq!(check(&mut engine, &prompt, 0, 96), ids);
    assert_eq!(check(&mut engine, &prompt, 1, 0), ids, "another tenant shares nothing");
    // The last token is computed always, be it the last of a block.
    check(&mut engine, &prompt[..96], 0, 64);
    // The next turn of a conversation finds the output too: 100 + 40 tokens, the last of them never computed.
    let mut next = prompt.clone();
    next.extend(&ids);
    next.extend(1..20);
    check(&mut engine, &next, 0, 128);
}

#[test]
fn bounds_end_a_stream() {
    let null = Null { vocab: 150, end_one_in: 40, ..Null::default() };
    let check = |change: &dyn Fn(&mut Generate), tokens: usize, reason: Finish| {
        let mut engine = engine(&null, config(4, 2, 64));
        let mut request = ask(0, (1..=100).collect(), 500);
        request.ignore_eos = true;
        change(&mut request);
        let stream = run(&mut engine, vec![request]).remove(0);
        let end = stream.end.expect("an end");
        assert_eq!((stream.ids.len(), end.0), (tokens, reason));
        stream.texts.concat() + &end.1
    };
    check(&|ask| ask.max_tokens = 7, 7, Finish::Length);
    // 4 blocks of 32 tokens.
    let whole = check(&|_| {}, 28, Finish::Length);
    let third = whole.split_inclusive(' ').nth(3).unwrap().trim_end().to_owned();
    let text = check(&|ask| ask.stop = vec![third.clone()], 3, Finish::Stop);
    assert!(whole.starts_with(&text) && !text.contains(&third));
    let expected = alone(&null, 1000, &ask(0, (1..=100).collect(), 500));
    assert_eq!(expected.end.as_ref().unwrap().0, Finish::Stop);
    assert_eq!(expected.end.as_ref().unwrap().2.output_tokens as usize, expected.ids.len() + 1);
}

#[test]
fn what_cannot_be_served_is_refused_with_figures() {
    let mut engine = engine(&Null { vocab: 50, ..Null::default() }, config(4, 2, 64));
    let mut check = |ask: Generate, kind: FailureKind, says: &str| {
        let failure = engine.generate(Time::ZERO, ask, channel(1).0).unwrap_err();
        assert_eq!(failure.kind, kind);
        assert!(failure.message.contains(says), "{}", failure.message);
    };
    check(ask(0, vec![1; 128], 1), FailureKind::Invalid, "128 tokens");
    check(ask(0, vec![], 1), FailureKind::Invalid, "no tokens");
    check(ask(0, vec![1], 0), FailureKind::Invalid, "max_tokens");
    check(ask(0, vec![50], 1), FailureKind::Invalid, "token 50");
    check(Generate { model: ModelId([1; 32]), ..ask(0, vec![1], 1) }, FailureKind::NoModel, "0101");
    let (sink, _events) = channel(1);
    for request in 0..QUEUE_MAX as u64 + 2 {
        engine.generate(Time::ZERO, ask(request, vec![1], 1), sink.clone()).unwrap();
    }
    let failure = engine.generate(Time::ZERO, ask(999, vec![1], 1), sink).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Busy);
}

#[test]
fn background_work_yields_within_one_step() {
    let null = Null::default();
    let mut engine = engine(&null, config(64, 2, 32));
    let (background, mut background_events) = channel(4096);
    let (urgent, mut urgent_events) = channel(4096);
    for request in 0..2 {
        let ask = Generate { priority: Priority::Background, ..ask(request, vec![1; 40], 200) };
        engine.generate(Time::ZERO, ask, background.clone()).unwrap();
    }
    (0..10).for_each(|_| _ = engine.step(Time::ZERO));
    let before = background_events.len();
    engine.generate(Time::ZERO, ask(2, vec![2; 60], 20), urgent).unwrap();
    // Two steps of prompt, then a token each.
    for step in 1..=20usize {
        engine.step(Time::ZERO);
        assert_eq!((urgent_events.len(), background_events.len()), (step.saturating_sub(1), before));
    }
    while engine.step(Time::ZERO) != Progress::Idle {}
    let mut count = 0;
    while let Ok(event) = background_events.try_recv() {
        count += usize::from(matches!(event, Event::Token(_)));
    }
    assert_eq!(count, 400);
    assert!(urgent_events.try_recv().is_ok());
}

#[test]
fn the_oldest_goes_on_when_blocks_run_out() {
    // Both begin with 2 blocks and end with 3.
    let mut engine = engine(&Null::default(), config(5, 2, 80));
    let (old_sink, mut old) = channel(100);
    let (young_sink, mut young) = channel(100);
    engine.generate(Time::ZERO, ask(0, vec![1; 33], 50), old_sink).unwrap();
    engine.generate(Time::ZERO, ask(1, vec![2; 33], 50), young_sink).unwrap();
    let mut preempted = false;
    for step in 1..=50 {
        engine.step(Time::ZERO);
        engine.check();
        assert_eq!(old.len(), step + usize::from(step == 50));
        preempted |= engine.status(Time::ZERO).queued == 1;
    }
    assert!(preempted);
    while engine.step(Time::ZERO) != Progress::Idle {}
    for events in [&mut old, &mut young] {
        let mut stream = Stream::default();
        while let Ok(event) = events.try_recv() {
            stream.add(event, 0);
        }
        assert_eq!(stream.ids.len(), 50);
    }
}

#[test]
fn a_reader_that_sleeps_gives_up_its_slot() {
    let null = Null::default();
    let mut engine = engine(&null, config(8, 1, 64));
    let (sink, mut sleepy) = channel(1);
    let (other_sink, other) = channel(100);
    engine.generate(Time::ZERO, ask(0, vec![1; 40], 20), sink).unwrap();
    (0..5).for_each(|_| _ = engine.step(Time::ZERO));
    engine.generate(Time::ZERO, ask(1, vec![2; 40], 20), other_sink).unwrap();
    assert_eq!(engine.step(Time::ZERO + STALL_MAX - Duration::from_nanos(1)), Progress::Blocked);
    assert_eq!(other.len(), 0);
    (0..30).for_each(|_| _ = engine.step(Time::ZERO + STALL_MAX));
    assert_eq!(other.len(), 21);
    let mut stream = Stream::default();
    while !stream.over() {
        engine.step(Time::ZERO + STALL_MAX);
        engine.check();
        sleepy.try_recv().into_iter().for_each(|event| stream.add(event, 0));
    }
    assert_eq!(stream.ids, alone(&null, 256, &ask(0, vec![1; 40], 20)).ids);
}

#[test]
fn a_deadline_ends_running_and_waiting_requests() {
    let null = Null::default();
    let mut engine = engine(&null, config(8, 1, 32));
    let mut readers: Vec<_> = (0..2)
        .map(|request| {
            let (sink, events) = channel(4096);
            let ask = Generate { deadline: Some(Duration::from_secs(1)), ..ask(request, vec![1], 200) };
            engine.generate(Time(5), ask, sink).unwrap();
            events
        })
        .collect();
    engine.step(Time(5));
    assert_eq!((engine.status(Time(5)).running, engine.status(Time(5)).queued), (1, 1));
    engine.step(Time(1_000_000_006));
    for (tokens, events) in [1, 0].into_iter().zip(&mut readers) {
        (0..tokens).for_each(|_| assert!(matches!(events.try_recv(), Ok(Event::Token(_)))));
        let Ok(Event::Failed(failure)) = events.try_recv() else { panic!("no failure") };
        assert_eq!(failure.kind, FailureKind::Deadline);
    }
    engine.check();
}

/// Fails at its third step.
struct Dying(Box<dyn Program>, u32);

impl Program for Dying {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        self.0.submit(batch)
    }
    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        self.1 += 1;
        if self.1 == 3 { Some(Err(DeviceError::Lost("unplugged".into()))) } else { self.0.poll() }
    }
    fn depth(&self) -> usize {
        self.0.depth()
    }
}

#[test]
fn a_lost_device_fails_every_request() {
    let (null, config) = (Null::default(), config(8, 1, 32));
    let program = Dying(null.virtual_program(config.layout).0, 0);
    let mut engine = Engine::new(Box::new(program), null.vocabulary(), config);
    let streams = run(&mut engine, vec![ask(0, vec![1], 50), ask(1, vec![1], 50)]);
    assert!(streams.iter().all(|s| s.failed == Some(FailureKind::Internal)));
    assert_eq!(streams[0].ids.len(), 2);
    let failure = engine.generate(Time::ZERO, ask(2, vec![1], 1), channel(1).0).unwrap_err();
    assert!(failure.message.contains("unplugged"));
    assert!(engine.status(Time::ZERO).failed.is_some());
}

/// 2,000 short requests through the thread; some are cancelled, of some the reader goes away. Both happen as tokens
/// come, so that an engine that gets no processor for a while isn't asked for ever more.
#[test]
fn a_soak_leaves_no_block_behind() {
    let null = Null { vocab: 100, end_one_in: 30, ..Null::default() };
    let config = config(40, 8, 64);
    let handle = Engine::spawn(null.program(config.layout), null.vocabulary(), config);
    let random = &mut Random(11);
    let mut open: HashMap<u64, (Receiver<Event>, Stream, Generate)> = HashMap::new();
    let mut next = 0;
    while next < 2000 || !open.is_empty() {
        if next < 2000 && open.len() < 40 {
            let ask = random_ask(random, next, 500);
            let (sink, events) = channel(4);
            handle.generate(ask.clone(), sink).unwrap();
            if random.one_in(20) {
                handle.cancel(ask.request, 0);
            }
            open.insert(next, (events, Stream::default(), ask));
            next += 1;
        }
        open.retain(|_, (events, stream, ask)| {
            let mut gone = false;
            while let Ok(event) = events.try_recv() {
                stream.add(event, 0);
                gone |= random.one_in(100);
                if random.one_in(100) {
                    handle.cancel(ask.request, 0);
                }
            }
            if stream.failed.is_none() && stream.end.is_some() {
                assert_eq!(stream.ids, alone(&null, config.bounded().context, ask).ids);
            }
            !stream.over() && !gone
        });
    }
    let status = loop {
        let status = handle.status();
        if status.running + status.queued == 0 {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(status.kv_blocks_free + status.kv_blocks_cached, status.kv_blocks_total);
    assert_eq!(status.failed, None);
    handle.shutdown();
    let refused = handle.generate(ask(0, vec![1], 1), channel(1).0).unwrap_err();
    assert_eq!(refused.kind, FailureKind::Internal);
}
