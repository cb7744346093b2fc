{{- define "weir.labels" -}}
app.kubernetes.io/name: weir
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "weir.selector" -}}
app.kubernetes.io/name: weir
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "weir.name" -}}
{{ printf "%s-weir" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}

{{- define "weir.hardened" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
capabilities: { drop: [ALL] }
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{- define "weir.otlp" -}}
{{- if .Values.telemetry.otlpEndpoint }}
- { name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .Values.telemetry.otlpEndpoint | quote }} }
- { name: OTEL_METRICS_EXPORTER, value: none }
{{- end }}
{{- end -}}

{{- /* The pod of a node: (dict "root" $ "of" .Values.nodes.x "cuda" bool "role" "name") */ -}}
{{- define "weir.nodePod" -}}
metadata:
  labels:
    {{- include "weir.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: "9464"
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 45
  securityContext: { fsGroup: 10001 }
  {{- with .of.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .of.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq .role "node" }}
  # Folders of the machine are root's until somebody hands them over.
  initContainers:
    - name: folders
      image: "{{ .root.Values.image.repository }}:{{ ternary .root.Values.image.cudaTag .root.Values.image.tag .cuda }}"
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      command: [chown, "10001:10001", /state, /models]
      securityContext:
        runAsUser: 0
        runAsNonRoot: false
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: { drop: [ALL], add: [CHOWN] }
      volumeMounts:
        - { name: state, mountPath: /state }
        - { name: models, mountPath: /models }
  {{- end }}
  containers:
    - name: node
      image: "{{ .root.Values.image.repository }}:{{ ternary .root.Values.image.cudaTag .root.Values.image.tag .cuda }}"
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      command: [weir]
      args:
        - --log-format=json
        {{- if .cuda }}
        - --device=cuda
        {{- end }}
        - join
        - $(WEIR_LINK)
        - --name=$(NODE_NAME)
        - --metrics=0.0.0.0:9464
        - --state=/state
        {{- range .of.models }}
        - --model={{ . }}
        {{- end }}
      env:
        - name: NODE_NAME
          valueFrom: { fieldRef: { fieldPath: {{ ternary "spec.nodeName" "metadata.name" (eq .role "node") }} } }
        - name: WEIR_LINK
          valueFrom: { secretKeyRef: { name: {{ .root.Values.nodes.joinSecret | quote }}, key: link } }
        - { name: WEIR_CACHE, value: /models }
        {{- include "weir.otlp" .root | nindent 8 }}
      ports:
        - { name: metrics, containerPort: 9464 }
      startupProbe:
        tcpSocket: { port: metrics }
        periodSeconds: 5
        failureThreshold: 720
      livenessProbe:
        tcpSocket: { port: metrics }
        periodSeconds: 20
      securityContext: {{- include "weir.hardened" .root | nindent 8 }}
      {{- $resources := deepCopy (.of.resources | default dict) }}
      {{- if .cuda }}
      {{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" 1) ($resources.limits | default dict)) }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - { name: state, mountPath: /state }
        - { name: models, mountPath: /models }
        - { name: tmp, mountPath: /tmp }
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if eq .role "node" }}
    # A machine is one node of the cluster, whatever becomes of its pod.
    - name: state
      hostPath: { path: /var/lib/weir-node, type: DirectoryOrCreate }
    - name: models
      hostPath: { path: /var/cache/weir, type: DirectoryOrCreate }
    {{- else }}
    - name: state
      emptyDir: {}
    - name: models
      emptyDir: {}
    {{- end }}
{{- end -}}
