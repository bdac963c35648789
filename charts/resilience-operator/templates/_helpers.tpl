{{- define "resilience-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "resilience-operator.fullname" -}}
{{- $name := include "resilience-operator.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "resilience-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "resilience-operator.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "resilience-operator.labels" -}}
{{ include "resilience-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | trimAll "._-" | quote }}
app.kubernetes.io/part-of: ticketwave
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimAll "._-" }}
{{- end }}

{{/* The rights in every namespace that is looked after; one list for both shapes of RBAC. */}}
{{- define "resilience-operator.watchedRules" -}}
- apiGroups: [resilience.ticketwave.io]
  resources: [resiliencepolicies, featureflags]
  verbs: [get, list, watch]
- apiGroups: [resilience.ticketwave.io]
  resources: [resiliencepolicies/status, featureflags/status, recoveries/status]
  verbs: [patch]
# Every action is written down as a Recovery before it is taken; those that are old are deleted.
- apiGroups: [resilience.ticketwave.io]
  resources: [recoveries]
  verbs: [get, list, watch, create, delete]
# Restarting all pods changes an annotation of the template, and a rollback brings back the template of a ReplicaSet, which a
# label points at. The admission policies let nothing else be changed.
- apiGroups: [apps]
  resources: [deployments, statefulsets, replicasets]
  verbs: [get, list, watch, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# Which pods an http or tcp check asks, by the selector of the Service that it names. There is no right to list them, nor to
# read endpoints: those can be made by hand.
- apiGroups: [""]
  resources: [services]
  verbs: [get]
# Annotating a pod makes its kubelet refresh the pod's optional mounts at once, and the status
# subresource carries annotations too; so the operator cannot touch the spec of any pod.
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
# Evicting is deleting within the limits of the disruption budgets; there is no right to delete a pod.
- apiGroups: [""]
  resources: [pods/eviction]
  verbs: [create]
{{- if ne (toString .Values.jobLogs) "false" }}
# How the log of a failed cleanup Job ends is told in the message of its Recovery.
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
{{- end }}
# A cleanup Job is made from a CronJob that somebody else put there, and never changed or deleted.
- apiGroups: [batch]
  resources: [cronjobs]
  verbs: [get]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch]
# The admin tokens are written, never read back. There is no right to patch, because a patch reads: copied into a
# field where it is not allowed, what a Secret holds comes back in the error.
- apiGroups: [""]
  resources: [secrets]
  verbs: [create, update]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- if eq .Values.podTransport "apiserver-proxy" }}
# Health is read with GET, a configuration pushed with PUT, an action asked for with POST.
- apiGroups: [""]
  resources: [pods/proxy]
  verbs: [get, create, update]
{{- end }}
{{- end }}

{{/* Name of an admission policy and of its binding. They are not in a namespace, and two namespaces may hold a release. */}}
{{- define "resilience-operator.clusterName" -}}
{{- printf "%s-%s.%s" (include "resilience-operator.fullname" .root) .name .root.Release.Namespace }}
{{- end }}

{{/* The head of an admission policy that asks nobody but the operator's service account. */}}
{{- define "resilience-operator.admissionPolicy" -}}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: {{ include "resilience-operator.clusterName" . | quote }}
  labels:
    {{- include "resilience-operator.labels" .root | nindent 4 }}
spec:
  failurePolicy: Fail
  matchConditions:
  - name: the-operator
    expression: request.userInfo.username == 'system:serviceaccount:{{ .root.Release.Namespace }}:{{ include "resilience-operator.fullname" .root }}'
{{- end }}

{{- define "resilience-operator.admissionBinding" -}}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ include "resilience-operator.clusterName" . | quote }}
  labels:
    {{- include "resilience-operator.labels" .root | nindent 4 }}
spec:
  policyName: {{ include "resilience-operator.clusterName" . | quote }}
  validationActions: [Deny]
  {{- with .cronJob }}
  # Of the namespace of the Job.
  paramRef:
    name: {{ . | quote }}
    parameterNotFoundAction: Deny
  {{- end }}
  {{- with .labelled }}
  # In the namespace of the request. All that carry the label must agree, so only one at a time does.
  paramRef:
    selector:
      matchExpressions:
      - {key: {{ . }}, operator: Exists}
    parameterNotFoundAction: Deny
  {{- end }}
{{- end }}

{{/* Whether nothing changes of the template of a workload but the annotation that restarts all pods. */}}
{{- define "resilience-operator.onlyRestarts" -}}
(object.spec.template.spec == oldObject.spec.template.spec
{{- range list "labels" "finalizers" "ownerReferences" "name" "generateName" "namespace" }}
&& object.spec.template.metadata.?{{ . }} == oldObject.spec.template.metadata.?{{ . }}
{{- end }}
&& object.spec.template.metadata.?annotations[?'resilience.ticketwave.io/restarted-by'].orValue('0123456789abcdef').matches('^[0-9a-f]{16}$')
&& object.spec.template.metadata.?annotations.orValue({}).all(k, k == 'resilience.ticketwave.io/restarted-by'
   || object.spec.template.metadata.annotations[k] == oldObject.spec.template.metadata.?annotations[?k].orValue('-'))
&& oldObject.spec.template.metadata.?annotations.orValue({}).all(k,
   k in object.spec.template.metadata.?annotations.orValue({})))
{{- end }}

{{/* The workload that owns an object, and whether it is the same as before. */}}
{{- define "resilience-operator.admissionOwners" -}}
- name: owners
  expression: >-
    object == null ? [] : object.metadata.?ownerReferences.orValue([]).filter(o, o.?controller.orValue(false)
    && o.apiVersion == 'apps/v1' && o.kind in ['Deployment', 'StatefulSet'])
- name: sameOwner
  expression: >-
    object != null && oldObject != null
    && variables.owners.exists(o, oldObject.metadata.?ownerReferences.orValue([]).exists(p, p.uid == o.uid && p.?controller.orValue(false)))
{{- end }}
