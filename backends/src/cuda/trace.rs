//! Times of launches, for profiles.
use super::driver::{Buffer, Gpu, Stream};
use super::kernels::traced;
use crate::program::{DeviceError, StepTime};
use std::cell::RefCell;
use std::sync::Arc;

/// Launches of a step that are traced, at most.
const TRACED: usize = 4096;
/// Bytes that a launch writes: when it began, was let go, and ended.
const EACH: usize = 32;

/// Times of launches, by their order in a step.
pub struct Trace {
    /// [`EACH`] bytes a launch; none where kernels note no times.
    times: Option<Buffer>,
    /// Launches of the last step that was launched or captured, and the bytes of weights that they read.
    names: RefCell<Vec<(&'static str, u64)>>,
    sums: Vec<StepTime>,
}

impl Trace {
    pub fn new(gpu: &Arc<Gpu>, stream: &Stream) -> Result<Trace, DeviceError> {
        let times = if traced() { Some(Buffer::zeroed(gpu, TRACED * EACH, stream)?) } else { None };
        Ok(Trace { times, names: RefCell::default(), sums: Vec::new() })
    }

    pub fn is_on(&self) -> bool {
        self.times.is_some()
    }

    /// Of all steps so far.
    pub fn sums(&self) -> Vec<StepTime> {
        self.sums.clone()
    }

    /// Where the next launch notes its times.
    pub fn next(&self, name: &'static str, bytes: u64) -> u64 {
        let Some(times) = &self.times else { return 0 };
        let mut names = self.names.borrow_mut();
        names.push((name, bytes));
        times.at + (EACH * (names.len().min(TRACED) - 1)) as u64
    }

    /// Before a step's launches.
    pub fn begin(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        let Some(times) = &self.times else { return Ok(()) };
        // a begin that is later than any, and ends that are earlier
        stream.fill(times, 0)?;
        for i in 0..TRACED {
            // SAFETY: inside the buffer.
            unsafe { stream.set(times.at + (EACH * i + 4) as u64, u32::MAX)? };
        }
        self.names.borrow_mut().clear();
        Ok(())
    }

    /// Waits for the step just launched, and adds its times.
    pub fn end(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        let Some(times) = &self.times else { return Ok(()) };
        let names = self.names.borrow();
        let mut raw = vec![0f32; names.len().min(TRACED) * EACH / 4];
        stream.download(&mut raw, times.at)?;
        let time = |launch: usize, point: usize| {
            let word = |i: usize| u64::from(raw[launch * EACH / 4 + point * 2 + i].to_bits());
            word(0) | word(1) << 32
        };
        let mut last = 0;
        for (i, (name, bytes)) in names.iter().enumerate().take(TRACED) {
            // a launch's share of the step is what it ends later than the one before
            let (begin, end) = (time(i, 0), time(i, 2));
            let nanos = end.saturating_sub(if last == 0 { begin } else { last });
            last = end;
            match self.sums.iter_mut().find(|s| s.name == *name) {
                Some(s) => (s.count, s.nanos, s.bytes) = (s.count + 1, s.nanos + nanos, s.bytes + bytes),
                None => self.sums.push(StepTime { name, count: 1, nanos, bytes: *bytes }),
            }
        }
        Ok(())
    }
}
