import { type FormEvent, StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { useWeir } from "./useWeir";

const MODEL = new URLSearchParams(location.search).get("model") ?? "/model.gguf";

function Chat() {
  // To ask a cluster instead: { kind: "cluster", url: "http://127.0.0.1:8484" }. Nothing else changes.
  const { ready, busy, progress, error, messages, send, cancel } = useWeir({ kind: "local", model: MODEL });
  const [text, setText] = useState("");
  const submit = (event: FormEvent) => {
    event.preventDefault();
    void send(text);
    setText("");
  };
  return (
    <main>
      <h1>A model in this page</h1>
      {!ready && progress && <progress value={progress.done} max={progress.total} aria-label="Loading the model" />}
      {error && <p role="alert">{error}</p>}
      <ol aria-live="polite">
        {messages.map(({ role, content }, i) => (
          <li key={i}>
            <strong>{role}</strong> {content}
          </li>
        ))}
      </ol>
      <form onSubmit={submit}>
        <input value={text} onChange={(event) => setText(event.target.value)} aria-label="Your message" disabled={!ready || busy} required />
        {busy ? <button type="button" onClick={cancel}>Stop</button> : <button disabled={!ready}>Send</button>}
      </form>
    </main>
  );
}

createRoot(document.getElementById("root")!).render(
  <StrictMode>
    <Chat />
  </StrictMode>,
);
