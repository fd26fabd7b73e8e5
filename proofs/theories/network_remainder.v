(** Through L blocks the remainder stays of second order, with an explicit constant

    Fix a scale t with |t| <= 1.  Let h_l be the base states, e_l = t (local shift of
    block l), J_l the derivative of base block l in its input, and F_l the blocks of a
    perturbed network: the tuned one, or the base one with e_l added at its output.
    Suppose that every block has a quadratic remainder near the base state,

      |F_l(h_l + v) - (h_(l+1) + e_l + J_l v)| <= C_l (t^2 + |v|^2),

    with |J_l v| <= L_l |v|, |e_l| <= D_l |t|, and the same for the embedding (C_emb,
    D_emb).  Let δ_l be the superposition of the e_l (superposition.v).

    Claims.
      - |run F n - (h_n + δ_n)| <= A_n t^2, with
          S_(n+1) = L_n S_n + D_n,                        S_0 = D_emb   (size of δ_n)
          A_(n+1) = L_n A_n + C_n (1 + (S_n + A_n)^2),    A_0 = C_emb.
      - So the tuned network and the base network steered at all blocks at once with
        its local first-order shifts differ by at most (A_n + A'_n) t^2.

    Assumptions.  V is any normed space (all tokens together).  The quadratic remainder
    is needed only for |v| <= S_l + A_l, so blocks that are smooth but have no global
    bound (softmax attention, RMS norm away from 0) are covered.

    Not said here.  The constants are worst case and grow fast with depth. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics error_control superposition.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Constants.
Variables (R : realDomainType) (L D C : nat -> R) (D_emb C_emb : R).

(** S_n: |δ_n| <= S_n |t|. *)
Fixpoint shift_size n : R :=
  if n is k.+1 then L k * shift_size k + D k else D_emb.

(** A_n: the remainder after n blocks is at most A_n t^2. *)
Fixpoint rem_size n : R :=
  if n is k.+1 then L k * rem_size k + C k * (1 + (shift_size k + rem_size k) ^+ 2)
  else C_emb.

Hypotheses (L0 : forall l, 0 <= L l) (D0 : forall l, 0 <= D l).
Hypotheses (C0 : forall l, 0 <= C l) (D_emb0 : 0 <= D_emb) (C_emb0 : 0 <= C_emb).

(** S_n >= 0 *)
Lemma shift_size_ge0 n : 0 <= shift_size n.
Proof. by elim: n => //= n IHn; rewrite addr_ge0 ?mulr_ge0. Qed.

(** A_n >= 0 *)
Lemma rem_size_ge0 n : 0 <= rem_size n.
Proof.
by elim: n => //= n IHn; rewrite addr_ge0 ?mulr_ge0 // addr_ge0 ?ler01 ?sqr_ge0.
Qed.
End Constants.

Section Remainder.
Variables (R : realDomainType) (V : normedZmodType R) (t : R).
Hypothesis t1 : `|t| <= 1.
Variables (h : nat -> V) (J : nat -> {additive V -> V}) (e_emb : V) (e : nat -> V).
Variables (L D : nat -> R) (D_emb : R).
Hypotheses (L0 : forall l, 0 <= L l) (D0 : forall l, 0 <= D l) (D_emb0 : 0 <= D_emb).
Hypothesis J_le : forall l v, `|J l v| <= L l * `|v|.
Hypotheses (e_le : forall l, `|e l| <= D l * `|t|) (e_emb_le : `|e_emb| <= D_emb * `|t|).

Let delta := propagated J e_emb e.
Let S := shift_size L D D_emb.

(** Network F started at x has quadratic remainders with constants C, C_emb, in balls
    of radius S_l + A_l around the base states. *)
Definition quadratic_blocks (F : nat -> V -> V) (x : V) (C : nat -> R) (C_emb : R) :=
  `|x - (h 0 + e_emb)| <= C_emb * t ^+ 2
  /\ forall l v, `|v| <= S l + rem_size L D C D_emb C_emb l ->
       `|F l (h l + v) - (h l.+1 + e l + J l v)| <= C l * (t ^+ 2 + `|v| ^+ 2).

(** |δ_n| <= S_n |t| *)
Lemma delta_le n : `|delta n| <= S n * `|t|.
Proof.
elim: n => //= n IHn; rewrite (le_trans (le_normD _ _)) // [X in _ <= X]mulrDl.
by rewrite le_add // (le_trans (J_le _ _)) // -mulrA le_mul2l.
Qed.

(** t^2 <= |t| *)
Lemma sqr_le_norm : t ^+ 2 <= `|t|.
Proof. by rewrite -real_normK ?num_real // expr2 le_shrink. Qed.

(** |run F n - (h_n + δ_n)| <= A_n t^2 *)
Theorem network_remainder F x C C_emb n :
    (forall l, 0 <= C l) -> 0 <= C_emb -> quadratic_blocks F x C C_emb ->
  `|run F n x - (h n + delta n)| <= rem_size L D C D_emb C_emb n * t ^+ 2.
Proof.
move=> C0 C_emb0 [x_le F_le]; elim: n => //= n IHn.
set A := rem_size L D C D_emb C_emb in F_le IHn *; set u := run F n x in IHn *.
have A0 : 0 <= A n by exact: rem_size_ge0.
have S0 : 0 <= S n by exact: shift_size_ge0.
pose v := u - h n; pose r := u - (h n + delta n).
have vE : v = delta n + r by rewrite /r (addrC (h n)) opprD addrCA addNKr.
have v_le : `|v| <= (S n + A n) * `|t|.
  rewrite vE (le_trans (le_normD _ _)) // mulrDl le_add ?delta_le //.
  by rewrite (le_trans IHn) // le_mul2l // sqr_le_norm.
have v_le1 : `|v| <= S n + A n.
  by rewrite (le_trans v_le) // mulrC le_shrink // addr_ge0.
have -> : F n u - (h n.+1 + delta n.+1)
        = (F n (h n + v) - (h n.+1 + e n + J n v)) + J n r.
  rewrite [h n + v]addrC subrK [in J n v]vE (raddfD (J n) (delta n)).
  have -> : delta n.+1 = J n (delta n) + e n by [].
  rewrite [h n.+1 + e n + _]addrA -[h n.+1 + e n + _]addrA (addrC (e n)).
  by rewrite [in RHS]opprD [in RHS]addrA subrK.
rewrite (le_trans (le_normD _ _)) // [X in _ <= X]mulrDl addrC le_add //.
  by rewrite (le_trans (J_le _ _)) // -mulrA le_mul2l.
rewrite (le_trans (F_le _ _ v_le1)) // -mulrA le_mul2l // mulrDl mul1r le_add2l.
by rewrite -[t ^+ 2]real_normK ?num_real // -exprMn le_mul // ?normr_ge0.
Qed.

(** Two networks with the same base states, derivatives and local shifts differ by at
    most (A_n + A'_n) t^2. *)
Theorem network_gap F x C C_emb F' x' C' C_emb' n :
    (forall l, 0 <= C l) -> 0 <= C_emb -> quadratic_blocks F x C C_emb ->
    (forall l, 0 <= C' l) -> 0 <= C_emb' -> quadratic_blocks F' x' C' C_emb' ->
  `|run F n x - run F' n x'|
    <= (rem_size L D C D_emb C_emb n + rem_size L D C' D_emb C_emb' n) * t ^+ 2.
Proof.
move=> C0 Ce0 qF C0' Ce0' qF'; rewrite -(subrKA (h n + delta n)) mulrDl.
rewrite (le_trans (le_normD _ _)) // le_add ?network_remainder //.
by rewrite distrC network_remainder.
Qed.

(** The base network with e_l added at every block is such a network. *)
Theorem steered_quadratic base C :
    (forall l, 0 <= C l) ->
    (forall l v, `|v| <= S l + rem_size L D C D_emb 0 l ->
       `|base l (h l + v) - (h l.+1 + J l v)| <= C l * `|v| ^+ 2) ->
  quadratic_blocks (fun l v => base l v + e l) (h 0 + e_emb) C 0.
Proof.
move=> C0 base_le; split=> [|l v v_le]; first by rewrite subrr normr0 mul0r.
have -> : base l (h l + v) + e l - (h l.+1 + e l + J l v)
        = base l (h l + v) - (h l.+1 + J l v).
  by rewrite [h l.+1 + _ + _]addrAC opprD addrACA subrr addr0.
by rewrite (le_trans (base_le _ _ v_le)) // le_mul2l // le_addr sqr_ge0.
Qed.
End Remainder.
