/** One endpoint and one conversation, for a component. */
import { useCallback, useEffect, useRef, useState } from "react";
import { type EndpointSpec, type Message, type Progress, Weir } from "weir";

export function useWeir(spec: EndpointSpec) {
  const weir = useRef<Weir | null>(null);
  const stop = useRef<AbortController | null>(null);
  const [progress, setProgress] = useState<Progress | null>(null);
  const [ready, setReady] = useState(false);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<string | null>(null);
  const [messages, setMessages] = useState<Message[]>([]);
  // The same endpoint stays, however often the component is drawn.
  const wanted = JSON.stringify(spec);

  useEffect(() => {
    const client = new Weir();
    let gone = false;
    weir.current = client;
    setReady(false);
    setError(null);
    const told = spec.kind === "local" ? { ...spec, onProgress: setProgress } : spec;
    client
      .add("chat", told)
      .then(() => (gone ? client.remove("chat") : setReady(true)))
      .catch((error: Error) => gone || setError(error.message));
    return () => {
      gone = true;
      stop.current?.abort();
      client.remove("chat");
    };
  }, [wanted]);

  const send = useCallback(
    async (content: string) => {
      const asked: Message[] = [...messages, { role: "user", content }];
      setMessages([...asked, { role: "assistant", content: "" }]);
      setBusy(true);
      setError(null);
      stop.current = new AbortController();
      let all = "";
      try {
        for await (const piece of weir.current!.chat(asked, { signal: stop.current.signal })) {
          all += piece;
          setMessages([...asked, { role: "assistant", content: all }]);
        }
      } catch (error) {
        if (!stop.current.signal.aborted) setError((error as Error).message);
      } finally {
        setBusy(false);
      }
    },
    [messages],
  );

  return { ready, busy, progress, error, messages, send, cancel: () => stop.current?.abort() };
}
