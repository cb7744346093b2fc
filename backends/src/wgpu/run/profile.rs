//! How often and how long dispatches ran.
use super::Ready;
use crate::program::StepTime;
use crate::wgpu::adapter::Gpu;
use ::wgpu::{Buffer, BufferUsages, CommandEncoder, ComputePass, QuerySet, QuerySetDescriptor, QueryType};

/// What dispatches cost so far.
pub(super) struct Profile {
    steps: Vec<StepTime>,
    /// Where times were asked for.
    clock: Option<Clock>,
}

/// Reads the GPU's clock between dispatches.
struct Clock {
    queries: QuerySet,
    resolved: Buffer,
    tick_nanos: f64,
    /// Of the dispatches of this step.
    names: Vec<&'static str>,
}

impl Profile {
    /// Measures times too, where that is asked for and the GPU can.
    pub(super) fn new(gpu: &Gpu, timed: bool) -> Profile {
        let clock = gpu.tick_nanos.filter(|_| timed).map(|nanos| Clock::new(gpu, nanos));
        Profile { steps: Vec::new(), clock }
    }

    pub(super) fn steps(&self) -> Vec<StepTime> {
        self.steps.clone()
    }

    /// To be called before each dispatch.
    pub(super) fn before(&self, pass: &mut ComputePass<'_>) {
        if let Some(clock) = self.clock.as_ref().filter(|clock| clock.names.is_empty()) {
            pass.write_timestamp(&clock.queries, 0);
        }
    }

    /// Counts a dispatch that was just recorded.
    pub(super) fn after(&mut self, pass: &mut ComputePass<'_>, ready: &Ready) {
        if let Some(clock) = &mut self.clock {
            clock.after(pass, ready.name);
        }
        match self.steps.iter_mut().find(|step| step.name == ready.name) {
            Some(step) => (step.count, step.bytes) = (step.count + 1, step.bytes + ready.bytes),
            None => {
                self.steps.push(StepTime { name: ready.name, count: 1, nanos: 0, bytes: ready.bytes });
            }
        }
    }

    /// The ticks of the step that ends here, in a buffer of at least so many bytes, and whose they are.
    pub(super) fn resolve(
        &mut self,
        commands: &mut CommandEncoder,
        buffer: impl FnOnce(u64) -> Buffer,
    ) -> Option<(Buffer, Vec<&'static str>)> {
        let clock = self.clock.as_mut()?;
        let ticks = 1 + clock.names.len() as u32;
        let into = buffer(8 * u64::from(ticks));
        commands.resolve_query_set(&clock.queries, 0..ticks, &clock.resolved, 0);
        commands.copy_buffer_to_buffer(&clock.resolved, 0, &into, 0, 8 * u64::from(ticks));
        Some((into, std::mem::take(&mut clock.names)))
    }

    /// Adds the times of a finished step.
    pub(super) fn time(&mut self, ticks: &[u8], names: &[&'static str]) {
        let Some(clock) = &self.clock else { return };
        let at = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| ticks[8 * i + k]));
        for (i, name) in names.iter().enumerate() {
            if let Some(step) = self.steps.iter_mut().find(|step| step.name == *name) {
                step.nanos += (at(i + 1).saturating_sub(at(i)) as f64 * clock.tick_nanos) as u64;
            }
        }
    }
}

impl Clock {
    const TICKS: u32 = 4096;

    fn new(gpu: &Gpu, tick_nanos: f64) -> Clock {
        let queries = gpu.device.create_query_set(&QuerySetDescriptor {
            label: None,
            ty: QueryType::Timestamp,
            count: Clock::TICKS,
        });
        let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
        let resolved = gpu.buffer("ticks", 8 * u64::from(Clock::TICKS), usage);
        Clock { queries, resolved, tick_nanos, names: Vec::new() }
    }

    fn after(&mut self, pass: &mut ComputePass<'_>, name: &'static str) {
        if self.names.len() + 1 < Clock::TICKS as usize {
            self.names.push(name);
            pass.write_timestamp(&self.queries, self.names.len() as u32);
        }
    }
}
