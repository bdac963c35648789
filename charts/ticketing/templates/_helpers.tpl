{{/* Labels of an object; call with (dict "root" $ "component" <name>). */}}
{{- define "ticketing.selectorLabels" -}}
app.kubernetes.io/name: {{ .component | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- end }}

{{- define "ticketing.labels" -}}
{{ include "ticketing.selectorLabels" . }}
app.kubernetes.io/part-of: ticketing
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimAll "._-" }}
{{- end }}

{{/* The services with their defaults filled in, as JSON by name; those that are switched off are left out. */}}
{{- define "ticketing.services" -}}
{{- $services := dict }}
{{- range $name, $own := .Values.services }}
{{- $service := mergeOverwrite (deepCopy $.Values.serviceDefaults) (deepCopy ($own | default dict)) }}
{{- if $service.enabled }}
{{- $_ := set $services $name $service }}
{{- end }}
{{- end }}
{{- toJson $services }}
{{- end }}

{{/* Where the database is, as environment variables. */}}
{{- define "ticketing.databaseEnv" -}}
{{- $db := .Values.database }}
{{- if .Values.postgresql.enabled -}}
- name: DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: postgres-auth
      key: url
{{- else if not $db.existingSecret -}}
{{- fail "no database: with postgresql.enabled=false set database.existingSecret (a Secret with the connection URL under the key `url`), or switch off the services that need one" }}
{{- else if $db.host -}}
- name: DATABASE_URL
  value: {{ printf "postgres://%s@%s:%d/%s%s" ($db.user | urlquery | replace "+" "%20") $db.host (int $db.port) $db.name (empty $db.parameters | ternary "" (printf "?%s" $db.parameters)) | quote }}
{{- else -}}
- name: DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ $db.existingSecret | quote }}
      key: {{ $db.urlKey | quote }}
{{- end }}
{{- if include "ticketing.databaseSecret" . }}
- name: DATABASE_PASSWORD_FILE
  value: /etc/ticketing/database/password
{{- end }}
{{- if not .Values.postgresql.enabled }}
{{- with $db.pooler }}
- name: DATABASE_POOLER
  value: {{ . | quote }}
{{- end }}
{{- with $db.migrationUrlKey }}
- name: DATABASE_MIGRATION_URL
  valueFrom:
    secretKeyRef:
      name: {{ $db.existingSecret | quote }}
      key: {{ . | quote }}
{{- end }}
{{- with $db.sslMode }}
- name: PGSSLMODE
  value: {{ . | quote }}
{{- end }}
{{- if $db.rootCertificates.configMap }}
- name: PGSSLROOTCERT
  value: /etc/ticketing/database-ca/root.crt
{{- end }}
{{- end }}
{{- end }}

{{/* The Secret with the database password as a key of its own, as JSON; nothing, if only the whole URL is known. */}}
{{- define "ticketing.databaseSecret" -}}
{{- $db := .Values.database -}}
{{- if .Values.postgresql.enabled -}}
{{- dict "name" "postgres-auth" "key" "password" | toJson -}}
{{- else if and $db.existingSecret $db.host -}}
{{- dict "name" $db.existingSecret "key" $db.passwordKey | toJson -}}
{{- end -}}
{{- end }}

{{/* That Secret as a volume. It is mounted as a folder: only so does the kubelet bring a rotated password to a running pod. */}}
{{- define "ticketing.databaseVolume" -}}
{{- with include "ticketing.databaseSecret" . }}
{{- $secret := fromJson . }}
- name: database
  secret:
    secretName: {{ $secret.name | quote }}
    defaultMode: 0440
    items:
    - key: {{ $secret.key | quote }}
      path: password
{{- end }}
{{- if include "ticketing.databaseRoots" . }}
- name: database-ca
  {{- include "ticketing.rootsOf" .Values.database.rootCertificates | nindent 2 }}
{{- end }}
{{- end }}

{{/* Certificates as the source of a volume; call with (dict "configMap" <name> "key" <key>). */}}
{{- define "ticketing.rootsOf" -}}
configMap:
  name: {{ .configMap | quote }}
  items:
  - key: {{ .key | quote }}
    path: root.crt
{{- end }}

{{/* Whether root certificates are mounted. */}}
{{- define "ticketing.databaseRoots" -}}
{{- if and (not .Values.postgresql.enabled) .Values.database.rootCertificates.configMap }}yes{{ end }}
{{- end }}

{{- define "ticketing.databaseMount" -}}
{{- if include "ticketing.databaseSecret" . }}
- name: database
  mountPath: /etc/ticketing/database
  readOnly: true
{{- end }}
{{- if include "ticketing.databaseRoots" . }}
- name: database-ca
  mountPath: /etc/ticketing/database-ca
  readOnly: true
{{- end }}
{{- end }}

{{/* The keys of the payment providers, and certificates that are trusted for them: where their files are, the volumes, and their
mounts; nothing without a Secret or a ConfigMap. */}}
{{- define "ticketing.providerEnv" -}}
{{- $env := (include "ticketing.services" . | fromJson).payment.env }}
{{- if .Values.providers.existingSecret }}
{{- range $name := list "STRIPE_URL" "PAYPAL_URL" }}
{{- if not (hasPrefix "https://" (get $env $name | toString)) }}
{{- fail (printf "providers.existingSecret: keys are sent over https only; set services.payment.env.%s to the provider's own https address, not to the simulator's" $name) }}
{{- end }}
{{- end }}
- name: STRIPE_API_KEY_FILE
  value: /etc/ticketing/providers/stripe-api-key
- name: PAYPAL_CLIENT_ID_FILE
  value: /etc/ticketing/providers/paypal-client-id
- name: PAYPAL_CLIENT_SECRET_FILE
  value: /etc/ticketing/providers/paypal-client-secret
{{- end }}
{{- if .Values.providers.rootCertificates.configMap }}
{{- if hasKey $env "PROVIDER_CA_FILE" }}
{{- fail "PROVIDER_CA_FILE would be set twice: use providers.rootCertificates, or services.payment.env.PROVIDER_CA_FILE with a file of your image" }}
{{- end }}
- name: PROVIDER_CA_FILE
  value: /etc/ticketing/provider-ca/root.crt
{{- end }}
{{- end }}

{{- define "ticketing.providerVolume" -}}
{{- if .Values.providers.existingSecret }}
- name: providers
  secret:
    secretName: {{ .Values.providers.existingSecret | quote }}
    defaultMode: 0440
{{- end }}
{{- with .Values.providers.rootCertificates }}
{{- if .configMap }}
- name: provider-ca
  {{- include "ticketing.rootsOf" . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ticketing.providerMount" -}}
{{- if .Values.providers.existingSecret }}
- name: providers
  mountPath: /etc/ticketing/providers
  readOnly: true
{{- end }}
{{- if .Values.providers.rootCertificates.configMap }}
- name: provider-ca
  mountPath: /etc/ticketing/provider-ca
  readOnly: true
{{- end }}
{{- end }}

{{/* The login at the mail server, and whom it is trusted by: settings, volumes and their mounts; nothing without them. */}}
{{- define "ticketing.mailEnv" -}}
{{- with .Values.mail }}
{{- if .existingSecret }}
{{- if not .user }}
{{- fail "mail.existingSecret: set mail.user, too, the user to log in as" }}
{{- end }}
{{- $env := (include "ticketing.services" $ | fromJson).notification.env }}
{{- if not (has (get $env "SMTP_ENCRYPTION" | toString) (list "starttls" "tls")) }}
{{- fail "mail.existingSecret: the password is sent encrypted only; set services.notification.env.SMTP_ENCRYPTION to starttls or tls" }}
{{- end }}
- name: SMTP_USER
  value: {{ .user | quote }}
- name: SMTP_PASSWORD_FILE
  value: /etc/ticketing/mail/password
{{- end }}
{{- if .rootCertificates.configMap }}
- name: SMTP_CA_FILE
  value: /etc/ticketing/mail-ca/ca.crt
{{- end }}
{{- end }}
{{- end }}

{{- define "ticketing.mailVolume" -}}
{{- with .Values.mail }}
{{- if .existingSecret }}
- name: mail
  secret:
    secretName: {{ .existingSecret | quote }}
    defaultMode: 0440
    items:
    - key: {{ .passwordKey | quote }}
      path: password
{{- end }}
{{- if .rootCertificates.configMap }}
- name: mail-ca
  configMap:
    name: {{ .rootCertificates.configMap | quote }}
    items:
    - key: {{ .rootCertificates.key | quote }}
      path: ca.crt
{{- end }}
{{- end }}
{{- end }}

{{- define "ticketing.mailMount" -}}
{{- with .Values.mail }}
{{- if .existingSecret }}
- name: mail
  mountPath: /etc/ticketing/mail
  readOnly: true
{{- end }}
{{- if .rootCertificates.configMap }}
- name: mail-ca
  mountPath: /etc/ticketing/mail-ca
  readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{/* The waiting room of the gateway: where its page goes on to, and its key; the volume with it, and its mount. */}}
{{- define "ticketing.waitingRoomEnv" -}}
- name: SHOP_URL
  value: {{ .Values.waitingRoom.shopUrl | quote }}
{{- if .Values.waitingRoom.existingSecret }}
- name: WAITING_ROOM_KEY_FILE
  value: /etc/ticketing/waiting-room/waiting-room-key
{{- end }}
{{- end }}

{{- define "ticketing.waitingRoomVolume" -}}
{{- if .Values.waitingRoom.existingSecret }}
- name: waiting-room
  secret:
    secretName: {{ .Values.waitingRoom.existingSecret | quote }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "ticketing.waitingRoomMount" -}}
{{- if .Values.waitingRoom.existingSecret }}
- name: waiting-room
  mountPath: /etc/ticketing/waiting-room
  readOnly: true
{{- end }}
{{- end }}

{{/* The operator's pods, as a peer of a NetworkPolicy. */}}
{{- define "ticketing.operatorPeer" -}}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ .Values.networkPolicy.operator.namespace | quote }}
  podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ .Values.networkPolicy.operator.name | quote }}
{{- end }}

{{/* The key that tickets are signed with: the Secret's name, as given or as made by this chart. */}}
{{- define "ticketing.ticketSecret" -}}
{{- .Values.tickets.existingSecret | default "ticket-key" -}}
{{- end }}

{{/* As a folder: only so does the kubelet bring a key that is replaced to a running pod. Optional: without it mails go, and
tickets follow once it is there. */}}
{{- define "ticketing.ticketVolume" -}}
- name: ticket-key
  secret:
    secretName: {{ include "ticketing.ticketSecret" . | quote }}
    optional: true
    defaultMode: 0440
    items:
    - key: {{ .Values.tickets.key | quote }}
      path: key.pem
{{- end }}

{{/* How the gateway knows buyers: its environment, the volumes with its secrets, and their mounts. */}}
{{- define "ticketing.gatewayEnv" -}}
{{- $gateway := .Values.gateway }}
{{- $tokens := $gateway.tokens }}
{{- if $tokens.jwksUrl }}
{{- if not (and $tokens.issuer $tokens.audience) }}
{{- fail "gateway.tokens.jwksUrl needs gateway.tokens.issuer and gateway.tokens.audience: tokens for others would be taken without them" }}
{{- end }}
- name: TOKEN_JWKS_URL
  value: {{ $tokens.jwksUrl | quote }}
- name: TOKEN_ISSUER
  value: {{ $tokens.issuer | quote }}
- name: TOKEN_AUDIENCE
  value: {{ $tokens.audience | quote }}
{{- if $tokens.rootCertificates.configMap }}
- name: TOKEN_CA_FILE
  value: /etc/ticketing/token-ca/root.crt
{{- end }}
{{- end }}
{{- if $tokens.hmacSecret }}
- name: TOKEN_HMAC_FILE
  value: /etc/ticketing/tokens/hmac-secrets
{{- end }}
- name: SESSION_KEY_FILE
  value: /etc/ticketing/sessions/session-keys
- name: SECURE_COOKIES
  value: {{ $gateway.sessions.secureCookies | quote }}
- name: TRUSTED_PROXIES
  value: {{ $gateway.trustedProxies | quote }}
- name: REQUESTS_PER_USER
  value: {{ $gateway.limits.requestsPerUser | quote }}
- name: REQUESTS_PER_SESSION
  value: {{ $gateway.limits.requestsPerSession | quote }}
- name: REQUESTS_PER_NETWORK
  value: {{ $gateway.limits.requestsPerNetwork | quote }}
- name: NEW_SESSIONS_PER_NETWORK
  value: {{ $gateway.limits.newSessionsPerNetwork | quote }}
- name: EVENT_REQUESTS_PER_NETWORK
  value: {{ $gateway.limits.eventRequestsPerNetwork | quote }}
{{- end }}

{{- define "ticketing.gatewayVolume" -}}
- name: sessions
  secret:
    secretName: {{ .Values.gateway.sessions.existingSecret | default "gateway-sessions" | quote }}
    defaultMode: 0440
{{- with .Values.gateway.tokens.hmacSecret }}
- name: tokens
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}
{{- with .Values.gateway.tokens }}
{{- if and .jwksUrl .rootCertificates.configMap }}
- name: token-ca
  {{- include "ticketing.rootsOf" .rootCertificates | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ticketing.gatewayMount" -}}
- name: sessions
  mountPath: /etc/ticketing/sessions
  readOnly: true
{{- if .Values.gateway.tokens.hmacSecret }}
- name: tokens
  mountPath: /etc/ticketing/tokens
  readOnly: true
{{- end }}
{{- if and .Values.gateway.tokens.jwksUrl .Values.gateway.tokens.rootCertificates.configMap }}
- name: token-ca
  mountPath: /etc/ticketing/token-ca
  readOnly: true
{{- end }}
{{- end }}
