/** Subgroups: what the engine's library doesn't know by name, and so doesn't ask for, devices are given all the same. */

interface Adapter {
  features: { has(name: string): boolean };
  info?: { isFallbackAdapter?: boolean };
  isFallbackAdapter?: boolean;
  requestDevice(descriptor?: { requiredFeatures?: string[] }): Promise<unknown>;
}

interface Gpu {
  requestAdapter(): Promise<Adapter | null>;
}

const ask = async () => (navigator as unknown as { gpu?: Gpu }).gpu?.requestAdapter().catch(() => null);

/** Whether there is a GPU, and not a program that imitates one. */
export async function isReal(): Promise<boolean> {
  const adapter = await ask();
  return !!adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter ?? false);
}

/** Whether GPUs of this browser have subgroups; if so, every device of this worker is asked for with them. */
export async function withSubgroups(): Promise<boolean> {
  const adapter = await ask();
  if (!adapter?.features.has("subgroups")) return false;
  const prototype = Object.getPrototypeOf(adapter) as Adapter;
  const request = prototype.requestDevice;
  prototype.requestDevice = function (this: Adapter, descriptor = {}) {
    const wanted = new Set([...(descriptor.requiredFeatures ?? []), "subgroups"]);
    const features = [...wanted].filter((name) => this.features.has(name));
    return request.call(this, { ...descriptor, requiredFeatures: features });
  };
  return true;
}
