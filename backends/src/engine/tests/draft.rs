//! A draft model changes no stream: not one that is always right, not one that never is, not one that is broken.
use super::super::drafter::PATIENCE;
use super::*;
use crate::program::Sampled;

/// How a draft model goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ill {
    /// One guess in so many is another token.
    Wrong(u32),
    /// Tokens that nobody has.
    Strange,
    /// Fewer results than were asked for.
    Few,
    /// None at all.
    Silent,
    /// An error after so many steps.
    Lost(u32),
    /// It takes no work.
    Refuses,
}

struct Sick(Box<dyn Program>, Ill, u32);

impl Program for Sick {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        match self.1 {
            Ill::Refuses => Err(DeviceError::Unsupported("no work today".into())),
            _ => self.0.submit(batch),
        }
    }
    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        if let Ill::Silent = self.1 {
            return None;
        }
        let mut output = self.0.poll()?;
        let Ok(step) = &mut output else { return Some(output) };
        self.2 += 1;
        match self.1 {
            Ill::Lost(after) if self.2 > after => return Some(Err(DeviceError::Lost("unplugged".into()))),
            Ill::Few => _ = step.segments.pop(),
            _ => {}
        }
        let ids = step.segments.iter_mut().filter_map(|segment| match segment {
            SegmentOutput::Sampled(ids) => Some(ids),
            _ => None,
        });
        for Sampled { id, .. } in ids.flatten() {
            self.2 += 1;
            match self.1 {
                Ill::Strange => *id = u32::MAX - self.2 % 2,
                Ill::Wrong(one_in) if self.2.is_multiple_of(one_in) => *id = 1 + *id % 9,
                _ => {}
            }
        }
        Some(output)
    }
    fn depth(&self) -> usize {
        self.0.depth()
    }
}

/// A draft model that computes what `null` does, but for what ails it.
pub(super) fn draft(null: &Null, config: EngineConfig, ill: Ill) -> Draft {
    let layout = config.bounded().layout;
    let program = Box::new(Sick(null.virtual_program(layout).0, ill, 0));
    Draft { program, layout, context: 1000, vocab: null.vocab, cost: 0.1 }
}

/// Three streams, chances among them, with a draft model.
fn check(ill: Ill, speculation: Speculation, depth: usize) -> EngineStatus {
    let null = Null { depth, ..Null::default() };
    let config = EngineConfig { speculation, ..config(64, 3, 64) };
    let mut engine = engine(&null, config).with_draft(draft(&null, config, ill));
    let asked = |i: u64| {
        let mut ask = ask(i, (1..50 * (1 + i as u32)).collect(), 300);
        ask.sampling.temperature = i as f32;
        ask.sampling.seed = i;
        ask
    };
    let asks: Vec<Generate> = (0..3).map(asked).collect();
    let expected: Vec<_> = asks.iter().map(|ask| alone(&null, 1000, ask).ids).collect();
    let found = run(&mut engine, asks.clone());
    assert!(found.iter().map(|stream| &stream.ids).eq(&expected), "{ill:?}, {speculation:?}");
    let status = engine.status(Time::ZERO);
    assert_eq!(status.tokens_generated, 900);
    // The second time their beginnings are in the cache, where the draft model has filled them or not.
    let found = run(&mut engine, asks);
    assert!(found.iter().map(|stream| &stream.ids).eq(&expected), "again: {ill:?}, {speculation:?}");
    status
}

#[test]
fn its_right_guesses_save_steps() {
    for depth in [1, 3] {
        let plain = check(Ill::Wrong(u32::MAX), Speculation::Off, depth);
        assert_eq!(plain.drafted, 0);
        for speculation in [Speculation::Always(4), Speculation::Auto] {
            let status = check(Ill::Wrong(u32::MAX), speculation, depth);
            assert!(status.drafted_right > 550 && status.steps * 2 < plain.steps, "{status:?}");
            assert_eq!(status.drafted_right, status.drafted);
            let status = check(Ill::Wrong(5), speculation, depth);
            assert!(status.drafted_right > 400 && status.drafted > status.drafted_right, "{status:?}");
        }
    }
}

#[test]
fn it_rests_where_it_does_not_pay() {
    let status = check(Ill::Wrong(1), Speculation::Auto, 1);
    assert!(status.drafted > 0 && status.drafted < 150, "{status:?}");
}

#[test]
fn a_broken_one_does_no_harm() {
    for ill in [Ill::Strange, Ill::Few, Ill::Lost(0), Ill::Lost(7), Ill::Refuses] {
        for speculation in [Speculation::Always(4), Speculation::Auto] {
            check(ill, speculation, 1);
            check(ill, speculation, 3);
        }
    }
}

#[test]
fn a_silent_one_is_not_waited_for_for_ever() {
    let (null, config) =
        (Null::default(), EngineConfig { speculation: Speculation::Auto, ..config(64, 3, 64) });
    let mut engine = engine(&null, config).with_draft(draft(&null, config, Ill::Silent));
    let ask = ask(0, vec![1, 2, 3], 50);
    let expected = alone(&null, 1000, &ask).ids;
    let (sink, mut events) = channel(100);
    engine.generate(Time::ZERO, ask, sink).unwrap();
    let mut now = Time::ZERO;
    while engine.step(now) != Progress::Idle {
        now = now + PATIENCE / 4;
    }
    let mut stream = Stream::default();
    while let Ok(event) = events.try_recv() {
        stream.add(event, 0);
    }
    assert_eq!(stream.ids, expected);
}
