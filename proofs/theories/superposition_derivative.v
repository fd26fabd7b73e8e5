(** The first-order equivalence: weight update and activation shifts have the same
    derivative

    A network is an embedding emb(w) followed by blocks f_l(w, h), all depending on
    one parameter vector w (parameters may be shared between blocks):

      h_0 = emb(w),   h_(l+1) = f_l(w, h_l).

    Let J_l = D_h f_l(w, h_l), e_l = D_w f_l(w, h_l) dw (the local shift of block l)
    and e_emb = D emb(w) dw.

    Claims.
      - JVP of the network: if emb and every f_l are differentiable there, so is h_n,
          D h_n(w) dw = J_(n<-0) e_emb + sum_(l < n) J_(n<-l+1) e_l .
      - Steering the base network with t e_emb, t e_0, t e_1, … at all blocks at once
        has at t = 0 the derivative of the tuned network w + t dw: their difference is
        o(t).  This is the first-order equivalence.
      - Steering with any offsets t o_emb, t o_0, t o_1, … misses the tuned network by
          t (J_(n<-0) (e_emb - o_emb) + sum_(l < n) J_(n<-l+1) (e_l - o_l)) + o(t):
        each local misfit, carried to the end.
      - Steering with the propagated shifts t δ_(l+1) at all blocks at once has instead
        the derivative sum_l (n - l) J_(n<-l+1) e_l  (over_count.v; no embedding update).

    Assumptions.  Differentiability at the base states only.  P and V are any normed
    spaces: V holds all tokens, so attention is covered.  The blocks are numbered by all
    natural numbers; those after the last may be constant.

    Not said here.  The size of the difference: see network_remainder.v.  [is_diff x f
    df] reads "f is differentiable at x and its differential is df". *)
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import boolp functions reals topology normedtype landau derive.
From Equiv Require Import basics superposition over_count.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory numFieldNormedType.Exports.
Local Open Scope ring_scope.

(** A function that vanishes at 0 with differential 0 is o(t). *)
Lemma flat_at_0 (R : realType) (V : normedModType R) (g : R^o -> V) (eps : R) :
    is_diff (0 : R^o) g (fun=> 0) -> g 0 = 0 -> 0 < eps ->
  \forall t \near (0 : R^o), `|g t| <= eps * `|t|.
Proof.
move=> [Ed Vd] g0; have /eqaddoP small := diff_locally Ed.
move=> /small; apply: filterS => t.
have -> : (g \o shift 0 - (cst (g 0) + 'd g (0 : R^o))) t = g t => //.
transitivity (g (t + 0) - (g 0 + 0)); first by rewrite Vd.
by rewrite g0 !addr0 subr0.
Qed.

Section Network.
Variables (R : realType) (P V : normedModType R).
Variables (emb : P -> V) (f : nat -> P * V -> V).

(** h_n as a function of the parameters. *)
Fixpoint state n (w : P) : V := if n is k.+1 then f k (w, state k w) else emb w.

Variable w : P.
Hypothesis emb_diff : differentiable emb w.
Hypothesis f_diff : forall l, differentiable (f l) (w, state l w).

(** J_l v = D f_l(w, h_l)(0, v) *)
Definition input_jvp l (v : V) : V := 'd (f l) (w, state l w) (0, v).

(** D f_l(w, h_l) is additive in the state. *)
Lemma input_jvp_additive l : additive (input_jvp l).
Proof.
move=> v v'; rewrite /input_jvp -raddfB; congr (_ _); apply/eqP.
by rewrite xpair_eqE /= subr0 !eqxx.
Qed.

(** J_l as an additive map. *)
Definition J l : {additive V -> V} := Additive (@input_jvp_additive l).

(** e_l = D f_l(w, h_l)(dw, 0), the local shift of block l. *)
Definition local_shift dw l : V := 'd (f l) (w, state l w) (dw, 0).

(** D h_n(w) dw follows the recursion of superposition.v. *)
Lemma state_diff n :
  is_diff w (state n) (fun dw => propagated J ('d emb w dw) (local_shift dw) n).
Proof.
elim: n => [|n IHn] /=; first exact: DiffDef.
have Dp : is_diff w (fun v => (v, state n v))
    (fun dw => (dw, propagated J ('d emb w dw) (local_shift dw) n)).
  exact: (is_diff_pair (is_diff_id w) IHn).
have Df : is_diff (w, state n w) (f n) ('d (f n) (w, state n w)).
  exact: DiffDef (f_diff n) _.
apply: (is_diff_eq (is_diff_comp Dp Df)); apply/funext => dw /=.
rewrite /local_shift /input_jvp addrC -raddfD; congr (_ _).
by apply/eqP; rewrite xpair_eqE /= addr0 add0r !eqxx.
Qed.

(** The JVP of the network in all its parameters is the sum of the carried local
    shifts. *)
Theorem network_jvp n :
  is_diff w (state n) (fun dw => carry J 0 n ('d emb w dw)
                                 + \sum_(l < n) carry J l.+1 n (local_shift dw l)).
Proof.
by apply: (is_diff_eq (state_diff n)); apply/funext => dw; rewrite superposition.
Qed.

(** Base network steered by fixed offsets: t o_emb after the embedding and t o_l at
    the output of every block l. *)
Fixpoint steered (o_emb : V) (o : nat -> V) n (t : R^o) : V :=
  if n is k.+1 then f k (w, steered o_emb o k t) + t *: o k else emb w + t *: o_emb.

(** At t = 0 nothing is steered. *)
Lemma steered0 o_emb o n : steered o_emb o n 0 = state n w.
Proof. by elim: n => [|n /= ->]; rewrite /= scale0r addr0. Qed.

(** Derivative of the steered state at t = 0: the recursion with local shifts o. *)
Theorem steered_diff o_emb o n :
  is_diff (0 : R^o) (steered o_emb o n) (fun t => t *: propagated J o_emb o n).
Proof.
elim: n => [|n IHn] /=.
  have D := is_diffD (is_diff_cst (emb w) (0 : R^o)) (is_diff_scalel 0 o_emb).
  by apply: (is_diff_eq D); apply/funext => t; rewrite /= [LHS]add0r.
have Dp : is_diff (0 : R^o) (fun t => (w, steered o_emb o n t))
    (fun t => (0, t *: propagated J o_emb o n)).
  exact: (is_diff_pair (is_diff_cst w 0) IHn).
have Df : is_diff (w, steered o_emb o n 0) (f n) ('d (f n) (w, state n w)).
  by rewrite steered0; exact: DiffDef (f_diff n) _.
have D := is_diffD (is_diff_comp Dp Df) (is_diff_scalel 0 (o n)).
apply: (is_diff_eq D); apply/funext => t.
rewrite [LHS]/(_ + _) /= scalerDr; congr (_ + _).
rewrite /input_jvp -linearZ; congr (_ _); apply/eqP.
by rewrite xpair_eqE /= scaler0 !eqxx.
Qed.

(** Derivative of the tuned network w + t dw at t = 0. *)
Lemma tuned_diff dw n :
  is_diff (0 : R^o) (fun t => state n (w + t *: dw))
    (fun t => t *: propagated J ('d emb w dw) (local_shift dw) n).
Proof.
have Da : is_diff (0 : R^o) (fun t : R^o => w + t *: dw) (fun t => t *: dw).
  have D := is_diffD (is_diff_cst w (0 : R^o)) (is_diff_scalel 0 dw).
  by apply: (is_diff_eq D); apply/funext => t; rewrite [LHS]add0r.
have Ds : is_diff (w + (0 : R^o) *: dw) (state n) ('d (state n) w).
  by rewrite scale0r addr0; have [Ex _] := state_diff n; exact: DiffDef Ex _.
apply: (is_diff_eq (is_diff_comp Da Ds)); apply/funext => t /=.
by rewrite linearZ; have [_ ->] := state_diff n.
Qed.

(** Local shifts at all blocks at once reproduce the update to first order: for every
    eps > 0, |h_n(w + t dw) - steered h_n(t)| <= eps |t| for all t close to 0. *)
Theorem first_order_equivalence dw n (eps : R) : 0 < eps ->
  \forall t \near (0 : R^o),
    `|state n (w + t *: dw) - steered ('d emb w dw) (local_shift dw) n t| <= eps * `|t|.
Proof.
apply: flat_at_0; last by rewrite scale0r addr0 steered0 subrr.
have D := is_diffB (tuned_diff dw n) (steered_diff ('d emb w dw) (local_shift dw) n).
by apply: (is_diff_eq D); apply/funext => t; exact: subrr.
Qed.

(** The recursion is additive: δ(e) - δ(o) = δ(e - o). *)
Lemma propagatedB e_emb o_emb (e o : nat -> V) n :
  propagated J e_emb e n - propagated J o_emb o n
    = propagated J (e_emb - o_emb) (fun l => e l - o l) n.
Proof.
elim: n => //= n IHn; rewrite -IHn -[input_jvp n (_ - _)]/(J n (_ - _)) raddfB.
by rewrite opprD addrACA.
Qed.

(** Tuned minus steered with any offsets: to first order the sum of the local misfits
    e_l - o_l, each carried to the end. *)
Theorem steering_error dw o_emb (o : nat -> V) n :
  is_diff (0 : R^o) (fun t => state n (w + t *: dw) - steered o_emb o n t)
    (fun t => t *: (carry J 0 n ('d emb w dw - o_emb)
                    + \sum_(l < n) carry J l.+1 n (local_shift dw l - o l))).
Proof.
have D := is_diffB (tuned_diff dw n) (steered_diff o_emb o n).
apply: (is_diff_eq D); apply/funext => t.
by rewrite -(superposition J _ (fun l => local_shift dw l - o l)) -propagatedB scalerBr.
Qed.

(** Propagated shifts at all blocks at once have a different derivative: block l
    counts n - l times (embedding not updated). *)
Theorem propagated_offsets_over_count dw n :
  is_diff (0 : R^o) (steered 0 (fun l => propagated J 0 (local_shift dw) l.+1) n)
    (fun t => t *: \sum_(l < n) carry J l.+1 n (local_shift dw l) *+ (n - l)).
Proof. by rewrite -over_count; exact: steered_diff. Qed.
End Network.
