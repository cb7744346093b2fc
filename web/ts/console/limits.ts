/** Whether somebody uses this machine, and where its power comes from, as far as browsers tell. */

/** Nobody touches it for so long: then it is nobody's. */
const IDLE_MS = 60_000;

interface Detector extends EventTarget {
  userState: "active" | "idle" | null;
  screenState: "locked" | "unlocked" | null;
  start(options: { threshold: number }): Promise<void>;
}

type Detectors = { new (): Detector; requestPermission(): Promise<"granted" | "denied"> };

/** Whether the machine's people are away; where the browser doesn't tell, whether they don't touch this page. */
export class Away {
  changed: () => void = () => {};
  note = "";
  #detector: Detector | undefined;
  #touched = Date.now();

  constructor() {
    const touch = () => {
      const was = this.isAway;
      this.#touched = Date.now();
      if (was) this.changed();
    };
    for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "touchstart"]) addEventListener(kind, touch, { passive: true });
    setInterval(() => this.isAway && this.changed(), 5_000);
  }

  get isAway(): boolean {
    const detector = this.#detector;
    if (detector) return detector.userState === "idle" || detector.screenState === "locked";
    return Date.now() - this.#touched > IDLE_MS;
  }

  /** Asks the browser to tell of the whole machine; to be called when somebody has just pressed something. */
  async watch(): Promise<void> {
    const detectors = (globalThis as { IdleDetector?: Detectors }).IdleDetector;
    if (this.#detector) return;
    try {
      if (!detectors || (await detectors.requestPermission()) !== "granted") throw new Error("it doesn't tell");
      const detector = new detectors();
      await detector.start({ threshold: IDLE_MS });
      detector.addEventListener("change", () => this.changed());
      this.#detector = detector;
      this.note = "for a minute, on the whole machine";
    } catch {
      this.note = "this browser doesn't tell of the machine, so it counts that nobody touches this page for a minute";
    }
  }
}

interface Battery extends EventTarget {
  charging: boolean;
}

export interface Mains {
  /** Whether the browser tells at all. */
  known: boolean;
  is: boolean;
  note: string;
  changed: () => void;
}

export function onMains(): Mains {
  const get = (navigator as { getBattery?: () => Promise<Battery> }).getBattery;
  const mains: Mains = { known: get !== undefined, is: true, note: "", changed: () => {} };
  if (!get) {
    mains.note = "this browser doesn't tell";
    return mains;
  }
  void get.call(navigator).then((battery) => {
    const look = () => {
      mains.is = battery.charging;
      mains.changed();
    };
    battery.addEventListener("chargingchange", look);
    look();
  });
  return mains;
}
